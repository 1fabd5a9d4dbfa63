"""What clients send and get, as OpenAPI tells it."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Share = Annotated[float, Field(ge=0, le=1)]


class ClassScore(BaseModel):
    """A class and its probability."""

    model_config = ConfigDict(populate_by_name=True)

    name: str = Field(alias="class")
    confidence: Share


class Answer(BaseModel):
    """The answer for one image."""

    prediction: str | None = Field(description="The most probable class; null where none reaches `threshold`.")
    confidence: Share = Field(description="Probability of the most probable class.")
    all_predictions: list[ClassScore] = Field(description="The `top_k` classes, highest first.")
    model: str = Field(description="Version of the model that answered.")
    request_id: str


class Failure(BaseModel):
    """Why there is no answer."""

    error: str
    request_id: str


class ImageFailure(Failure):
    """Why one of several images has no answer."""

    status: int = Field(description="The HTTP status that the image alone would have had.")


class JsonImages(BaseModel):
    """Images in JSON."""

    model_config = ConfigDict(extra="forbid")

    image: str | None = Field(None, description="A file in base64, or a data URL of one.")
    images: list[str] | None = Field(None, description="Several, for a list of answers.")


class VersionInfo(BaseModel):
    """A version of a model."""

    version: str
    share: Share = Field(description="Of the requests that name no version.")
    engine: str
    class_names: list[str]
    image_size: int = Field(description="Height and width in pixels that images are brought to.")
    resize: str = Field(description="How.")
    architecture: str
    metrics: dict[str, float] = Field(description="On the validation images of its training.")


class Metadata(BaseModel):
    """What is served."""

    models: dict[str, list[VersionInfo]]
    default_model: str
    problem: str | None = Field(description="Why the last change of the models was not made, if it was not.")


class Ready(BaseModel):
    """State of a replica."""

    status: str
