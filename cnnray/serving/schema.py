"""Request and response models of the service's own API, as OpenAPI describes them."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Share = Annotated[float, Field(ge=0, le=1)]


CANARY_KEY = "X-Canary-Key"
CANARY_KEY_PARAMETER = {
    "name": CANARY_KEY,
    "in": "header",
    "required": False,
    "schema": {"type": "string"},
    "description": "Requests with the same value get the same version of a model.",
}
"""As OpenAPI describes the header."""


class ClassScore(BaseModel):
    """A class and its probability."""

    model_config = ConfigDict(populate_by_name=True)

    name: str = Field(alias="class")
    confidence: Share


class Answer(BaseModel):
    """The prediction for one image."""

    prediction: str | None = Field(
        description="The most probable class; null if none reaches `threshold`, if the model is unsure, or if it has "
        "several labels for an image, and this one has none."
    )
    confidence: Share = Field(description="Probability of the most probable class.")
    all_predictions: list[ClassScore] = Field(description="The `top_k` classes, highest first.")
    model: str = Field(description="Version of the model that answered.")
    request_id: str
    labels: list[ClassScore] | None = Field(
        None, description="Of a model with several labels: those that the image has, highest first."
    )
    status: Literal["ok", "unsure"] | None = Field(None, description="Of a model that may be unsure of an image.")
    candidates: list[ClassScore] | None = Field(
        None, description="If the model is unsure: the classes that the image may have, highest first."
    )
    group: str | None = Field(
        None, description="If the model is unsure of the class, and not of its group: that group."
    )
    heat_map: str | None = Field(
        None, description="With `explain`: a PNG file in base64, the image with the regions that support the class."
    )
    heat_map_problem: str | None = Field(None, description="With `explain`: why there is no heat map.")


class ModelQuery(BaseModel):
    """The model that a request is for."""

    model: str | None = Field(None, description="Name of the model; by default the first one.")
    version: str | None = Field(None, description="Version of the model; by default one according to the shares.")


class ExplainQuery(ModelQuery):
    """Parameters of `POST /explain`."""

    label: str | None = Field(None, description="Class whose support is shown; by default the most probable one.")


class PredictQuery(ModelQuery):
    """Parameters of `POST /predict`."""

    explain: bool = Field(False, description="Whether the answers have a `heat_map`.")
    top_k: int = Field(5, ge=1, le=1000, description="Largest number of classes in `all_predictions`.")
    threshold: float = Field(
        0.0, ge=0, le=1, description="Smallest probability of a class in `prediction` and `all_predictions`."
    )


class Failure(BaseModel):
    """Why a request has no prediction."""

    error: str
    request_id: str


class ImageFailure(Failure):
    """Why one of several images has no prediction."""

    status: int = Field(description="HTTP status that a request with only this image would have.")


class JsonImages(BaseModel):
    """Images in JSON."""

    model_config = ConfigDict(extra="forbid")

    image: str | None = Field(None, description="An image file in base64, or a data URL with base64.")
    images: list[str] | None = Field(None, description="Several such images. The response is a list.")


class VersionInfo(BaseModel):
    """A version of a model."""

    version: str
    share: Share = Field(description="Share of the requests without `version` that it answers.")
    verdict: str | None = Field(
        description="Of a canary, each with a reason: wait, promote or roll back while it is judged; promoted or "
        "rolled back once that was done."
    )
    engine: str
    digest: str = Field(description="SHA-256 of the file that the engine runs.")
    class_names: list[str]
    thresholds: list[float] | None = Field(
        None,
        exclude_if=lambda value: value is None,
        description="With several labels: the smallest probability with which an image has each class.",
    )
    groups: dict[str, str] | None = Field(
        None, exclude_if=lambda value: value is None, description="Groups of classes: by class, its group."
    )
    image_size: int | str = Field(description="What the network takes, in pixels: 224, or 224x320 (height x width).")
    resize: str = Field(description="How images of other shapes are resized.")
    decode_size: int | str | None = Field(
        description="Size to which images are resized before image_size is cut out of the centre; null: image_size."
    )
    architecture: str
    metrics: dict[str, float] = Field(description="Metrics on the validation images of its training.")


class Metadata(BaseModel):
    """The models that are served."""

    models: dict[str, list[VersionInfo]]
    default_model: str
    problem: str | None = Field(
        description="Why the last change of the models failed, or why a version is left out; either is tried again. "
        "null: there is no problem."
    )
    direct: bool = Field(description="Whether this request has reached the replica past Ray's wrapper.")


class Ready(BaseModel):
    """State of a replica."""

    status: str
