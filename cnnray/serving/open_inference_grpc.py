"""The Open Inference Protocol v2 over gRPC, by Serve's gRPC server: the answers that `open_inference` has over HTTP.

A refused request has a gRPC status by `_CODES`, and the sentence that it has over HTTP.
"""

import logging
import time
from collections.abc import Mapping
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from ray.serve.grpc_util import RayServegRPCContext

from cnnray.images.decode import BadImage
from cnnray.models.runtimes import Images
from cnnray.serving import open_inference
from cnnray.serving.admission import Held
from cnnray.serving.bodies import RequestError, too_large, validate
from cnnray.serving.gate import REQUEST_ID, request_id_from
from cnnray.serving.grpc_messages import SERVICE, message_class
from cnnray.serving.keys import Keys
from cnnray.serving.open_inference import InferRequest
from cnnray.serving.request_log import request_id as logged_id
from cnnray.serving.schema import CANARY_KEY
from cnnray.serving.service import Service
from cnnray.serving.settings import Settings

log = logging.getLogger(__name__)

METHODS = ("ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelInfer")
_PUBLIC = ("ServerLive", "ServerReady")
"""Methods that need no API key."""
_MOST_OUTPUTS = 16
_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT, 401: grpc.StatusCode.UNAUTHENTICATED, 404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED, 413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    415: grpc.StatusCode.INVALID_ARGUMENT, 422: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED, 500: grpc.StatusCode.INTERNAL, 503: grpc.StatusCode.UNAVAILABLE,
}  # fmt: skip
"""gRPC status by the status that a request has over HTTP."""


def add_to_server(servicer: Any, server: Any) -> None:
    """Called by Serve, which replaces the handlers by calls of the deployment's methods.

    Requests stay bytes, which a replica parses itself.
    """
    handlers = {name: grpc.unary_unary_rpc_method_handler(getattr(servicer, name)) for name in METHODS}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))


class GrpcGate:
    """What every gRPC request passes: request id, API key, errors, metrics, access log; then its method."""

    def __init__(self, service: Service, keys: Keys) -> None:
        self._service, self._keys = service, keys
        self._methods = {
            "ServerLive": self._server_live,
            "ServerReady": self._server_ready,
            "ModelReady": self._model_ready,
            "ServerMetadata": self._server_metadata,
            "ModelMetadata": self._model_metadata,
            "ModelInfer": self._model_infer,
        }

    async def answer(self, method: str, request: bytes, context: RayServegRPCContext) -> Any:
        """The response to a request; an empty one, with another status than OK, to a request that is refused.

        Args:
            method: one of `METHODS`.
            request: its message.
            context: has the client's metadata, and takes the status.
        """
        start, status, key = time.perf_counter(), 499, None  # 499: the client left before an answer
        metadata = {name: value for name, value in context.invocation_metadata() if isinstance(value, str)}
        request_id, held = request_id_from(metadata), Held(self._service.admission)
        logged_id.set(request_id)
        response = message_class(f"{method}Response")
        try:
            if method not in _PUBLIC:
                key = self._keys.check(metadata)
            answer = response(**await self._methods[method](request, metadata, held))
            status = 200
            return answer
        except RequestError as error:
            status, sentence = error.status, str(error)
        except Exception:
            log.exception("request %s", request_id)
            status, sentence = 500, "Internal error."
        finally:
            held.release()
            seconds = time.perf_counter() - start
            context.set_trailing_metadata([(REQUEST_ID, request_id)])
            self._service.metrics.record_request(f"/{SERVICE}/{method}", status, seconds)
            self._service.log_access(request_id, "gRPC", f"/{SERVICE}/{method}", status, seconds, key)
        context.set_code(_CODES[status])
        context.set_details(sentence)
        return response()

    async def _server_live(self, request: bytes, metadata: Mapping[str, str], held: Held) -> dict[str, Any]:
        return {"live": True}

    async def _server_ready(self, request: bytes, metadata: Mapping[str, str], held: Held) -> dict[str, Any]:
        return {"ready": self._service.models is not None}

    async def _server_metadata(self, request: bytes, metadata: Mapping[str, str], held: Held) -> dict[str, Any]:
        return open_inference.SERVER

    async def _model_ready(self, request: bytes, metadata: Mapping[str, str], held: Held) -> dict[str, Any]:
        asked = _parse("ModelReadyRequest", request)
        self._service.choose_model(asked.name, asked.version or None)
        return {"ready": True}

    async def _model_metadata(self, request: bytes, metadata: Mapping[str, str], held: Held) -> dict[str, Any]:
        asked = _parse("ModelMetadataRequest", request)
        return open_inference.describe_model(
            self._service, self._service.choose_model(asked.name, asked.version or None)
        )

    async def _model_infer(self, request: bytes, metadata: Mapping[str, str], held: Held) -> dict[str, Any]:
        service = self._service
        service.ready_models()
        settings = service.settings
        assert settings is not None
        if len(request) > settings.max_bytes:
            raise too_large(settings)
        held.add_bytes(len(request), settings)
        service.admission.check_images(settings, 1)
        asked, infer_request, images = await service.parse(request, lambda body: _parse_infer(body, settings))
        key = metadata.get(CANARY_KEY.lower())
        served = service.choose_model(asked.model_name, asked.model_version or None, key)
        open_inference.check_outputs(infer_request, served)
        answers = await open_inference.classify(service, served, images)
        outputs, contents = [], []
        for output, values in open_inference.requested_outputs(infer_request, served, answers):
            shape, kind = list(values.shape), open_inference.datatype(values)
            outputs.append({"name": output.name, "datatype": kind, "shape": shape})
            contents.append(open_inference.to_binary(values))
        return {
            "model_name": served.name, "model_version": served.version, "id": asked.id, "outputs": outputs,
            "raw_output_contents": contents,
        }  # fmt: skip


def _parse(name: str, request: bytes) -> Any:
    try:
        return message_class(name).FromString(request)
    except DecodeError:
        raise RequestError(400, f"The message is no {name}.") from None


def _parse_infer(body: bytes, settings: Settings) -> tuple[Any, InferRequest, list[bytes | BadImage] | Images]:
    """The message of a request, the request as over HTTP, and its images."""
    asked = _parse("ModelInferRequest", body)
    if len(asked.inputs) != 1 or len(asked.raw_input_contents) > 1:
        raise RequestError(
            400,
            f"There are {len(asked.inputs)} inputs and {len(asked.raw_input_contents)} raw_input_contents; expected "
            "one input, image or image_bytes, and at most one of raw_input_contents.",
        )
    (tensor,) = asked.inputs
    # What a few bytes of a message stand for takes much more memory as objects.
    if len(asked.outputs) > _MOST_OUTPUTS or len(tensor.contents.bytes_contents) > settings.max_images:
        raise RequestError(
            413, f"A request may have at most {_MOST_OUTPUTS} outputs and {settings.max_images} images."
        )
    if asked.raw_input_contents:
        (binary,) = asked.raw_input_contents
    elif tensor.contents.bytes_contents:
        binary = open_inference.pack_strings(tensor.contents.bytes_contents)
    else:
        try:
            binary = bytes(tensor.contents.uint_contents)
        except ValueError:
            raise RequestError(400, "The pixels are not integers from 0 to 255.") from None
    outputs = [{"name": output.name, "parameters": _parameters(output.parameters)} for output in asked.outputs]
    infer_request = validate(
        InferRequest,
        {
            "inputs": [
                {
                    "name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape),
                    "parameters": {"binary_data_size": len(binary)},
                }
            ],
            "outputs": outputs or None,
        },
        "The message",
    )  # fmt: skip
    return asked, infer_request, open_inference.read_images(infer_request, binary, settings)


def _parameters(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The values of parameters by name."""
    chosen = {name: value.WhichOneof("parameter_choice") for name, value in parameters.items()}
    return {name: getattr(parameters[name], field) for name, field in chosen.items() if field}
