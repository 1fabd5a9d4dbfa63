"""The ASGI application of a replica: middleware, health, metadata, the page, `POST /predict`, and other protocols."""

from importlib.resources import files
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException

import cnnray
from cnnray.images.decode import BadImage
from cnnray.models.predictor import rank_classes
from cnnray.models.runtimes import Probabilities
from cnnray.serving import open_inference, tensorflow_serving
from cnnray.serving.bodies import RequestError, read_images
from cnnray.serving.gate import Gate
from cnnray.serving.models import ServedModel
from cnnray.serving.schema import (
    CANARY_KEY_PARAMETER,
    Answer,
    Failure,
    ImageFailure,
    JsonImages,
    Metadata,
    Ready,
    VersionInfo,
)
from cnnray.serving.service import STATUS_BY_REASON, Service, canary_key

_RETRY_AFTER = {"Retry-After": "1"}
_ONLY_THIS_HOST = {"Content-Security-Policy": "default-src 'self' 'unsafe-inline' data: blob:"}
"""Header of pages: browsers load nothing from other hosts, which a cluster without internet could not reach."""
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
_DESCRIPTIONS = {
    400: "There is no image, or the body cannot be read.",
    401: "The API key is missing or wrong.",
    404: "There is no such model or version.",
    408: "The body did not arrive in time.",
    413: "The body, the image or the number of images is too large.",
    415: "The body is not an image of a supported type.",
    422: "The image is damaged, or a parameter is out of range.",
    500: "The network gives values that are no probabilities, or the service has a bug.",
    503: "The service is overloaded, too slow or starting: try again.",
}
FAILURES: dict[int | str, dict[str, Any]] = {
    status: {"model": Failure, "description": description} for status, description in _DESCRIPTIONS.items()
}


class _Application(FastAPI):
    """FastAPI with the schemas of bodies that routes parse themselves."""

    def openapi(self) -> dict[str, Any]:
        """See FastAPI."""
        description = super().openapi()
        description["components"]["schemas"] |= _BODIES
        return description


_BODIES = models_json_schema(
    [(JsonImages, "validation"), (open_inference.InferRequest, "validation")],
    ref_template="#/components/schemas/{model}",
)[1]["$defs"]


def create_application(service: Service, api_key: str | None = None, *, adds_request_ids: bool = True) -> FastAPI:
    """Create the application with all routes.

    Args:
        service: answers the requests.
        api_key: key that requests must send, except for health and the page; None: no key.
        adds_request_ids: add the header X-Request-ID to answers. Serve adds it itself.
    """
    app = _Application(
        title="cnnray",
        version=cnnray.__version__,
        description="Image classification. Send images to /predict, or use the Open Inference Protocol (/v2) or "
        "TensorFlow Serving's REST API (/v1).",
        docs_url=None,  # FastAPI's page loads its scripts from the web
        redoc_url=None,
    )
    app.state.service = service
    app.add_middleware(Gate, service=service, api_key=api_key, adds_request_ids=adds_request_ids)
    app.add_exception_handler(RequestError, _request_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_api_route("/", _page, methods=["GET"], response_class=HTMLResponse, include_in_schema=False)
    app.add_api_route("/docs", _docs, methods=["GET"], response_class=HTMLResponse, include_in_schema=False)
    app.mount("/docs", StaticFiles(directory=str(files("fastapi_offline").joinpath("static"))))
    app.add_api_route("/health/live", _live, methods=["GET"], tags=["health"])
    app.add_api_route("/health/ready", _ready, methods=["GET"], tags=["health"], responses={503: FAILURES[503]})
    app.add_api_route("/metadata", _metadata, methods=["GET"], responses=_failures(401, 503))
    app.add_api_route(
        "/predict",
        _predict,
        methods=["POST"],
        response_model=Answer | list[Answer | ImageFailure],
        responses=FAILURES,
        openapi_extra={"requestBody": _REQUEST_BODY, "parameters": [CANARY_KEY_PARAMETER]},
    )
    app.include_router(open_inference.router, responses=FAILURES)
    app.include_router(tensorflow_serving.router, responses=FAILURES)
    return app


def _failures(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: FAILURES[status] for status in statuses}


# -- errors ---------------------------------------------------------------------------------------------------


def error_response(request: Request, status: int, sentence: str) -> JSONResponse:
    """The response to a request that failed."""
    content = {"error": sentence, "request_id": request.state.request_id}
    return JSONResponse(content, status, _RETRY_AFTER if status == 503 else None)


async def _request_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestError)
    return error_response(request, error.status, str(error))


async def _validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return error_response(request, 422, f"{'.'.join(map(str, first['loc'][1:]))}: {first['msg']}.")


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    response = error_response(request, error.status_code, f"{error.detail}.")
    response.headers.update(error.headers or {})
    return response


# -- routes ---------------------------------------------------------------------------------------------------


async def _page() -> HTMLResponse:
    return HTMLResponse(_PAGE, headers=_ONLY_THIS_HOST)


_PAGE = files("cnnray.serving").joinpath("page.html").read_text()


async def _docs() -> HTMLResponse:
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


async def _live() -> Ready:
    """Whether the process answers."""
    return Ready(status="live")


async def _ready(request: Request) -> Ready:
    """Whether the models are loaded and warmed up."""
    request.app.state.service.ready_models()
    return Ready(status="ready")


async def _metadata(request: Request) -> Metadata:
    """The models that are served, their versions and engines."""
    service: Service = request.app.state.service
    models = service.ready_models()
    return Metadata(
        models={
            name: [_version_info(served, share) for served, share in models.versions(name)] for name in models.names
        },
        default_model=models.names[0],
        problem=service.problem,
    )


def _version_info(served: ServedModel, share: float) -> VersionInfo:
    info = served.bundle.info
    return VersionInfo(
        version=served.version, share=share, engine=served.engine, class_names=info.class_names,
        image_size=info.image_size, resize=info.resize, decode_size=info.decode_size,
        architecture=info.architecture, metrics=info.metrics,
    )  # fmt: skip


async def _predict(
    request: Request,
    top_k: Annotated[int, Query(ge=1, le=1000, description="Largest number of classes in `all_predictions`.")] = 5,
    threshold: Annotated[
        float, Query(ge=0, le=1, description="Smallest probability of a class in `prediction` and `all_predictions`.")
    ] = 0.0,
    model: Annotated[str | None, Query(description="Name of the model; by default the first one.")] = None,
    version: Annotated[
        str | None, Query(description="Version of the model; by default one according to the shares.")
    ] = None,
) -> JSONResponse:
    """Classify one image (the response is an object) or several (a list, in order, of answers and errors)."""
    service: Service = request.app.state.service
    served = service.choose_model(model, version, canary_key(request))
    images, several = await service.read(read_images, request)
    rows = await service.classify(served, images)
    request_id = request.state.request_id
    if not several:
        (row,) = rows
        if isinstance(row, BadImage):
            return error_response(request, STATUS_BY_REASON.get(row.reason, 422), f"The image cannot be used: {row}.")
        return JSONResponse(_answer(served, row, top_k, threshold, request_id))
    return JSONResponse(
        [
            {
                "error": f"The image cannot be used: {row}.",
                "status": STATUS_BY_REASON.get(row.reason, 422),
                "request_id": request_id,
            }
            if isinstance(row, BadImage)
            else _answer(served, row, top_k, threshold, request_id)
            for row in rows
        ]
    )


def _answer(served: ServedModel, row: Probabilities, top_k: int, threshold: float, request_id: str) -> dict[str, Any]:
    names = served.bundle.info.class_names
    (order,) = rank_classes(row[None], top_k)
    scores = [{"class": names[index], "confidence": float(row[index])} for index in order if row[index] >= threshold]
    best = float(row[order[0]])
    return {
        "prediction": names[order[0]] if best >= threshold else None,
        "confidence": best,
        "all_predictions": scores,
        "model": served.version,
        "request_id": request_id,
    }
