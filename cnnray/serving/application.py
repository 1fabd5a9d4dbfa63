"""The ASGI application of a replica: health, metadata, the pages, `POST /predict`, and other protocols."""

import base64
import functools
import reprlib
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
from cnnray.models.answers import rank_classes
from cnnray.models.runtimes import Probabilities
from cnnray.serving import jobs, open_inference, repository, tensorflow_serving
from cnnray.serving.bodies import RequestError, parse_images
from cnnray.serving.gate import Gate
from cnnray.serving.keys import Keys
from cnnray.serving.models import ServedModel
from cnnray.serving.operations import BINARY, USUAL_FAILURES, Bodies, Operation, describe
from cnnray.serving.schema import (
    Answer,
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
        class_names=info.class_names, thresholds=info.thresholds,
        image_size=info.image_size, resize=info.resize, decode_size=info.decode_size,
        architecture=info.architecture, metrics=info.metrics,
    )  # fmt: skip


async def _predict(service: Service, request: Request) -> Response | dict[str, Any] | list[Any]:
    """Classify one image (the response is an object) or several (a list, in order, of answers and errors)."""
    query = _NO_QUERY if not request.url.query else _parse_query(PredictQuery, request)
    served = service.choose_model(query.model, query.version, canary_key(request))
    images, several = await _read_images(service, request)
    rows = await service.classify(served, images)
    request_id = request.state.request_id
    answers = [
        _failure(row, request_id) if isinstance(row, BadImage) else _answer(served, row, query, request_id)
        for row in rows
    ]
    if query.explain:
        await _add_heat_maps(service, served, images, rows, answers)
    if several:
        return answers
    ((row, answer),) = zip(rows, answers, strict=True)
    if isinstance(row, BadImage):
        raise RequestError(answer["status"], answer["error"])
    return answer


async def _add_heat_maps(
    service: Service,
    served: ServedModel,
    images: list[bytes | BadImage],
    rows: list[Probabilities | BadImage],
    answers: list[dict[str, Any]],
) -> None:
    """Add the heat maps to the answers, or why there are none: the answers are there, and are not thrown away."""
    good = [(image, int(row.argmax()), answer) for image, row, answer in zip(images, rows, answers, strict=True)
            if isinstance(image, bytes) and not isinstance(row, BadImage)]  # fmt: skip
    if not good:
        return
    problem, pictures = None, [b""] * len(good)
    try:
        pictures = await service.explain(served, [image for image, _, _ in good], [index for _, index, _ in good])
    except RequestError as error:
        problem = str(error)
    for (_, _, answer), picture in zip(good, pictures, strict=True):
        answer["heat_map"] = base64.b64encode(picture).decode() or None
        answer["heat_map_problem"] = problem


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
    (row,) = await service.classify_all(served, images)
    index = int(row.argmax()) if query.label is None else names.index(query.label)
    assert isinstance(image, bytes)
    (picture,) = await service.explain(served, [image], [index])
    unsure = served.threshold is not None and bool(served.threshold.is_unsure(row[None])[0])
    status = {"x-status": "unsure" if unsure else "ok"} if served.threshold else {}
    headers = status | {
        "x-class": quote(names[index]),
        "x-confidence": f"{float(row[index]):.6f}",
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


def _answer(served: ServedModel, row: Probabilities, query: PredictQuery, request_id: str) -> dict[str, Any]:
    names = served.bundle.info.class_names
    (order,) = rank_classes(row[None], query.top_k)
    scores = [_score(names, row, index) for index in order if row[index] >= query.threshold]
    best, threshold = float(row[order[0]]), served.threshold
    answer = {
        "prediction": names[order[0]] if best >= query.threshold else None,
        "confidence": best,
        "all_predictions": scores,
        "model": served.version,
        "request_id": request_id,
    }
    if served.label_thresholds is not None:
        found = [_score(names, row, index) for index in served.labels(row) if row[index] >= query.threshold]
        answer |= {"prediction": found[0]["class"] if found else None, "labels": found}
    if threshold:
        answer["status"] = "ok"
        if threshold.is_unsure(row[None])[0]:
            answer |= {"status": "unsure", "prediction": None}
            answer["candidates"] = [_score(names, row, index) for index in threshold.candidates(row)]
    return answer


def _score(names: list[str], row: Probabilities, index: int) -> dict[str, Any]:
    return {"class": names[index], "confidence": float(row[index])}


_IMAGES: Bodies = {
    "multipart/form-data": _FORM, "image/*": BINARY, "application/octet-stream": BINARY,
    "application/json": JsonImages,
}  # fmt: skip
_OPERATIONS = [
    Operation(
        "POST", "/predict", _predict, query=PredictQuery, answer=Answer | list[Answer | ImageFailure], bodies=_IMAGES,
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
