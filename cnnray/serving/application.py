"""The ASGI application of a replica: health, metadata, the pages, `POST /predict`, and other protocols."""

import base64
import functools
import reprlib
from collections.abc import Iterable
from importlib.resources import files
from typing import Any, TypeVar
from urllib.parse import quote

import pydantic
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Mount, Router
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocketClose

import cnnray
from cnnray.images.decode import BadImage
from cnnray.models.answers import Answer, rank_classes
from cnnray.serving import jobs, open_inference, repository, schema, tensorflow_serving
from cnnray.serving.bodies import RequestError, parse_images
from cnnray.serving.gate import Gate
from cnnray.serving.keys import Keys
from cnnray.serving.models import ServedModel
from cnnray.serving.operations import BINARY, USUAL_FAILURES, Bodies, Operation, describe
from cnnray.serving.schema import (
    ExplainQuery,
    ImageFailure,
    JsonImages,
    Metadata,
    ModelQuery,
    PredictQuery,
    Ready,
    VersionInfo,
)
from cnnray.serving.service import STATUS_BY_REASON, Service, canary_key

Query = TypeVar("Query", bound=ModelQuery)

_ONLY_THIS_HOST = {"Content-Security-Policy": "default-src 'self' 'unsafe-inline' data: blob:"}
"""Header of pages: browsers load nothing from other hosts, which a cluster without internet could not reach."""
_FORM = {
    "type": "object",
    "properties": {"image": {"type": "array", "items": BINARY, "minItems": 1}},
    "required": ["image"],
}


def create_application(service: Service, keys: Keys | None = None, *, behind_ray: bool = False) -> Gate:
    """Create the application with all routes.

    Args:
        service: answers the requests.
        keys: one of which requests must send, except for health and the page; None or empty: they need none.
        behind_ray: whether requests come through Ray's wrapper, which adds the header X-Request-ID itself.
    """
    docs = StaticFiles(directory=str(files("fastapi_offline").joinpath("static")))
    router = Router([*_OPERATIONS, Mount("/docs", docs)], default=_not_found)
    return Gate(router, service=service, keys=keys or Keys([]), behind_ray=behind_ray)


async def _not_found(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await WebSocketClose()(scope, receive, send)
    else:
        raise HTTPException(404)


# -- routes ---------------------------------------------------------------------------------------------------


async def _page(service: Service, request: Request) -> HTMLResponse:
    return HTMLResponse(_PAGE, headers=_ONLY_THIS_HOST)


_PAGE = files("cnnray.serving").joinpath("page.html").read_text()


async def _docs(service: Service, request: Request) -> HTMLResponse:
    """Swagger UI, with the scripts that come with fastapi-offline."""
    page = get_swagger_ui_html(
        openapi_url="openapi.json",
        title="cnnray",
        swagger_js_url="docs/swagger-ui-bundle.js",
        swagger_css_url="docs/swagger-ui.css",
        swagger_favicon_url="data:,",
        swagger_ui_parameters={"validatorUrl": None},  # by default, a service on the web validates the description
    )
    page.headers.update(_ONLY_THIS_HOST)
    return page


async def _live(service: Service, request: Request) -> Ready:
    """Whether the process answers."""
    return Ready(status="live")


async def _ready(service: Service, request: Request) -> Ready:
    """Whether the models are loaded and warmed up."""
    service.ready_models()
    return Ready(status="ready")


async def _openapi(service: Service, request: Request) -> JSONResponse:
    root_path = request.scope.get("root_path")
    return JSONResponse(
        _description(request.scope["needs_key"]) | ({"servers": [{"url": root_path}]} if root_path else {})
    )


async def _metadata(service: Service, request: Request) -> Metadata:
    """The models that are served, their versions and engines."""
    models = service.ready_models()
    settings, verdicts = service.settings, service.canaries.verdicts
    decided = {(model.name, model.version): model.verdict for model in settings.models} if settings else {}
    waiting = {(release.name, release.canary): f"{verdict.action}: {verdict.reason}"
               for release, verdict in verdicts.items()}  # fmt: skip
    return Metadata(
        models={
            name: [
                _version_info(served, share, (decided | waiting).get((name, served.version)))
                for served, share in models.versions(name)
            ]
            for name in models.names
        },
        default_model=models.names[0],
        problem=service.problem,
        direct=not request.scope["behind_ray"],
    )


def _version_info(served: ServedModel, share: float, verdict: str | None) -> VersionInfo:
    info = served.bundle.info
    return VersionInfo(
        version=served.version, share=share, verdict=verdict, engine=served.engine, digest=served.digest,
        class_names=info.class_names, thresholds=info.thresholds, groups=info.groups,
        image_size=info.image_size, resize=info.resize, decode_size=info.decode_size,
        architecture=info.architecture, metrics=info.metrics,
    )  # fmt: skip


async def _predict(service: Service, request: Request) -> Response | dict[str, Any] | list[Any]:
    """Classify one image (the response is an object) or several (a list, in order, of answers and errors)."""
    query = _NO_QUERY if not request.url.query else _parse_query(PredictQuery, request)
    served = service.choose_model(query.model, query.version, canary_key(request))
    images, several = await _read_images(service, request)
    answers = await service.classify(served, images)
    request_id = request.state.request_id
    described = [
        _failure(answer, request_id)
        if isinstance(answer, BadImage)
        else _describe(served, answer, query) | {"request_id": request_id}
        for answer in answers
    ]
    if query.explain:
        await _add_heat_maps(service, served, images, answers, described)
    if several:
        return described
    if isinstance(answers[0], BadImage):
        raise RequestError(described[0]["status"], described[0]["error"])
    return described[0]


async def _add_heat_maps(
    service: Service,
    served: ServedModel,
    images: list[bytes | BadImage],
    answers: list[Answer | BadImage],
    described: list[dict[str, Any]],
) -> None:
    """Add the heat maps to the answers, or why there are none: the answers are there, and are not thrown away."""
    good = [(image, answer.best, content) for image, answer, content in zip(images, answers, described, strict=True)
            if isinstance(image, bytes) and not isinstance(answer, BadImage)]  # fmt: skip
    if not good:
        return
    problem, pictures = None, [b""] * len(good)
    try:
        pictures = await service.explain(served, [image for image, _, _ in good], [index for _, index, _ in good])
    except RequestError as error:
        problem = str(error)
    for (_, _, content), picture in zip(good, pictures, strict=True):
        content["heat_map"] = base64.b64encode(picture).decode() or None
        content["heat_map_problem"] = problem


async def _explain(service: Service, request: Request) -> Response:
    """Show which regions of an image support its class, or another one, as a PNG file."""
    query = _parse_query(ExplainQuery, request)
    service.check_explains()
    served = service.choose_model(query.model, query.version, canary_key(request))
    images, several = await _read_images(service, request)
    if several:
        raise RequestError(400, "Expected one image: send `image`, not the list `images` or several files.")
    names = served.bundle.info.class_names
    if query.label is not None and query.label not in names:
        raise RequestError(404, f"There is no class {reprlib.repr(query.label)}.")
    (image,) = images
    (answer,) = await service.classify_all(served, images)
    index = answer.best if query.label is None else names.index(query.label)
    assert isinstance(image, bytes)
    (picture,) = await service.explain(served, [image], [index])
    headers = ({"x-status": answer.status} if served.rules.threshold else {}) | {
        "x-class": quote(names[index]),
        "x-confidence": f"{float(answer.probabilities[index]):.6f}",
        "x-model": served.version,
    }
    return Response(picture, media_type="image/png", headers=headers)


async def _read_images(service: Service, request: Request) -> tuple[list[bytes | BadImage], bool]:
    """See `parse_images`."""
    content_type = request.headers.get("content-type", "")
    return await service.read(request, lambda body, settings: parse_images(body, content_type, settings))


_NO_QUERY = PredictQuery.model_validate({})


def _parse_query(model: type[Query], request: Request) -> Query:
    try:
        return model.model_validate(dict(request.query_params))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise RequestError(422, f"{first['loc'][0]}: {first['msg']}.") from None


def _failure(error: BadImage, request_id: str) -> dict[str, Any]:
    return {
        "error": f"The image cannot be used: {error}.",
        "status": STATUS_BY_REASON.get(error.reason, 422),
        "request_id": request_id,
    }


def _describe(served: ServedModel, answer: Answer, query: PredictQuery) -> dict[str, Any]:
    names, row = served.bundle.info.class_names, answer.probabilities

    def scores(classes: Iterable[int]) -> list[dict[str, Any]]:
        return [{"class": names[index], "confidence": float(row[index])} for index in classes]

    (order,) = rank_classes(row[None], query.top_k)
    prediction = answer.prediction
    content = {
        "prediction": None if prediction is None or row[prediction] < query.threshold else names[prediction],
        "confidence": answer.confidence,
        "all_predictions": scores(index for index in order if row[index] >= query.threshold),
        "model": served.version,
    }
    if served.rules.multi_label:
        content["labels"] = scores(index for index in answer.labels if row[index] >= query.threshold)
    if served.rules.threshold:
        content["status"] = answer.status
        if answer.status == "unsure":
            content["candidates"] = scores(answer.candidates)
            if served.rules.groups:
                content["group"] = served.rules.group_name(answer)
    return content


_IMAGES: Bodies = {
    "multipart/form-data": _FORM, "image/*": BINARY, "application/octet-stream": BINARY,
    "application/json": JsonImages,
}  # fmt: skip
_OPERATIONS = [
    Operation(
        "POST", "/predict", _predict, query=PredictQuery, answer=schema.Answer | list[schema.Answer | ImageFailure],
        bodies=_IMAGES,
    ),
    Operation(
        "POST", "/explain", _explain, query=ExplainQuery, answer={"image/png": BINARY}, bodies=_IMAGES,
        failures=(*USUAL_FAILURES, 403),
    ),
    *jobs.OPERATIONS,
    *open_inference.OPERATIONS,
    *repository.OPERATIONS,
    *tensorflow_serving.OPERATIONS,
    Operation("GET", "/metadata", _metadata, answer=Metadata, failures=(401, 429, 503)),
    Operation("GET", "/health/live", _live, answer=Ready, failures=(), tag="health"),
    Operation("GET", "/health/ready", _ready, answer=Ready, failures=(503,), tag="health"),
    Operation("GET", "/openapi.json", _openapi, answer=None),
    Operation("GET", "/docs", _docs, answer=None),
    Operation("GET", "/", _page, answer=None),
]  # fmt: skip


@functools.cache
def _description(needs_key: bool) -> dict[str, Any]:
    return describe(
        _OPERATIONS,
        needs_key=needs_key,
        title="cnnray",
        version=cnnray.__version__,
        description="Image classification. Send images to /predict, or use the Open Inference Protocol (/v2) or "
        "TensorFlow Serving's REST API (/v1).",
    )
