"""The ASGI application of a replica: middleware, health, metadata, the page, and `POST /predict`."""

import importlib.metadata
from importlib.resources import files
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException

from cnnray.images.decode import BadImage
from cnnray.models.predictor import rank_classes
from cnnray.models.runtimes import Probabilities
from cnnray.serving import open_inference, tensorflow_serving
from cnnray.serving.bodies import RequestError, images_of
from cnnray.serving.gate import Gate
from cnnray.serving.models import Served
from cnnray.serving.schema import Answer, Failure, ImageFailure, JsonImages, Metadata, Ready, VersionInfo
from cnnray.serving.service import STATUS_OF, Service

_RETRY_AFTER = {"Retry-After": "1"}
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_REQUEST_BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "properties": {"image": {"type": "array", "items": _BINARY["schema"], "minItems": 1}},
                "required": ["image"],
            }
        },
        "image/*": _BINARY,
        "application/octet-stream": _BINARY,
        "application/json": {"schema": {"$ref": "#/components/schemas/JsonImages"}},
    },
}
_MEANINGS = {
    400: "No image, or a body that cannot be read.",
    401: "No API key, or a wrong one.",
    404: "No such model or version.",
    408: "The body did not come in time.",
    413: "The body, the image or the number of images is too large.",
    415: "Not an image of a type that is read.",
    422: "An image that is damaged, or a parameter that is out of range.",
    503: "Overloaded or too slow: try again.",
}
FAILURES: dict[int | str, dict[str, Any]] = {
    status: {"model": Failure, "description": meaning} for status, meaning in _MEANINGS.items()
}


class _Application(FastAPI):
    """FastAPI, whose description has also the models of bodies that are read by hand."""

    def openapi(self) -> dict[str, Any]:
        """See FastAPI."""
        found = super().openapi()
        found["components"]["schemas"] |= _BODIES
        return found


_BODIES = models_json_schema(
    [(JsonImages, "validation"), (open_inference.InferRequest, "validation")],
    ref_template="#/components/schemas/{model}",
)[1]["$defs"]


def application(service: Service, api_key: str | None = None, *, names_requests: bool = True) -> FastAPI:
    """All routes over one service.

    Args:
        service: whose models answer.
        api_key: that requests must bring, but for health and the page; None: none.
        names_requests: whether answers have the header X-Request-ID from here; Serve gives them one itself.
    """
    app = _Application(
        title="cnnray",
        version=importlib.metadata.version("cnnray"),
        description="Image classification. Send images to /predict, or use the Open Inference Protocol (/v2) or "
        "TensorFlow Serving's REST API (/v1).",
        redoc_url=None,
    )
    app.state.service = service
    app.add_middleware(Gate, service=service, api_key=api_key, names_requests=names_requests)
    app.add_exception_handler(RequestError, _request_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_api_route("/", _page, methods=["GET"], response_class=HTMLResponse, include_in_schema=False)
    app.add_api_route("/health/live", _live, methods=["GET"], tags=["health"])
    app.add_api_route("/health/ready", _ready, methods=["GET"], tags=["health"], responses={503: FAILURES[503]})
    app.add_api_route("/metadata", _metadata, methods=["GET"], responses=_some(401, 503))
    app.add_api_route(
        "/predict",
        _predict,
        methods=["POST"],
        response_model=Answer | list[Answer | ImageFailure],
        responses=FAILURES,
        openapi_extra={"requestBody": _REQUEST_BODY},
    )
    app.include_router(open_inference.router, responses=FAILURES)
    app.include_router(tensorflow_serving.router, responses=FAILURES)
    return app


def _some(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: FAILURES[status] for status in statuses}


# -- errors ---------------------------------------------------------------------------------------------------


def failure(request: Request, status: int, sentence: str) -> JSONResponse:
    """The answer to a request that has none."""
    content = {"error": sentence, "request_id": request.state.request_id}
    return JSONResponse(content, status, _RETRY_AFTER if status == 503 else None)


async def _request_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestError)
    return failure(request, error.status, str(error))


async def _validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return failure(request, 422, f"{'.'.join(map(str, first['loc'][1:]))}: {first['msg']}.")


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    answer = failure(request, error.status_code, f"{error.detail}.")
    answer.headers.update(error.headers or {})
    return answer


# -- routes ---------------------------------------------------------------------------------------------------


async def _page() -> HTMLResponse:
    return HTMLResponse(_PAGE)


_PAGE = files("cnnray.serving").joinpath("page.html").read_text()


async def _live() -> Ready:
    """Whether the process answers."""
    return Ready(status="live")


async def _ready(request: Request) -> Ready:
    """Whether models are loaded, and have answered an image."""
    request.app.state.service.served()
    return Ready(status="ready")


async def _metadata(request: Request) -> Metadata:
    """What is served, and how."""
    service: Service = request.app.state.service
    service.served()
    assert service.models is not None
    return Metadata(
        models={
            name: [_version_info(one, share) for one, share in service.models.versions(name)]
            for name in service.models.names
        },
        default_model=service.models.names[0],
        problem=service.problem,
    )


def _version_info(served: Served, share: float) -> VersionInfo:
    info = served.bundle.info
    return VersionInfo(
        version=served.version, share=share, engine=served.engine, class_names=info.class_names,
        image_size=info.image_size, resize=info.resize, architecture=info.architecture, metrics=info.metrics,
    )  # fmt: skip


async def _predict(
    request: Request,
    top_k: Annotated[int, Query(ge=1, le=1000, description="Classes in `all_predictions`.")] = 5,
    threshold: Annotated[float, Query(ge=0, le=1, description="Classes below it are left out.")] = 0.0,
    model: Annotated[str | None, Query(description="Name of the model.")] = None,
    version: Annotated[str | None, Query(description="Of the model; else one by the versions' shares.")] = None,
) -> JSONResponse:
    """Classify one image (an object) or several (a list, in order, each with an answer or an error)."""
    service: Service = request.app.state.service
    served = service.served(model, version)
    images, several = await service.read(images_of, request)
    rows = await service.classify(served, images)
    request_id = request.state.request_id
    if not several:
        (row,) = rows
        if isinstance(row, BadImage):
            return failure(request, STATUS_OF.get(row.reason, 422), f"The image cannot be used: {row}.")
        return JSONResponse(_answer(served, row, top_k, threshold, request_id))
    return JSONResponse(
        [
            {
                "error": f"The image cannot be used: {row}.",
                "status": STATUS_OF.get(row.reason, 422),
                "request_id": request_id,
            }
            if isinstance(row, BadImage)
            else _answer(served, row, top_k, threshold, request_id)
            for row in rows
        ]
    )


def _answer(served: Served, row: Probabilities, top_k: int, threshold: float, request_id: str) -> dict[str, Any]:
    names = served.bundle.info.class_names
    (order,) = rank_classes(row[None], top_k)
    found = [{"class": names[index], "confidence": float(row[index])} for index in order if row[index] >= threshold]
    best = float(row[order[0]])
    return {
        "prediction": names[order[0]] if best >= threshold else None,
        "confidence": best,
        "all_predictions": found,
        "model": served.version,
        "request_id": request_id,
    }
