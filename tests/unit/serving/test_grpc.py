"""The Open Inference Protocol over gRPC: its messages, and that answers and refusals are those of HTTP."""

import asyncio
import contextlib
import logging

import grpc
import numpy as np
import pytest
import tritonclient.grpc
from tritonclient.grpc import service_pb2

from cnnray.images.decode import BadImage, decode
from cnnray.models.bundle import Bundle
from cnnray.models.predictor import Predictor
from cnnray.serving import grpc_messages
from cnnray.serving.grpc_messages import message_class
from cnnray.serving.keys import Key, Keys
from cnnray.serving.open_inference_grpc import METHODS, GrpcGate, add_to_server
from tests.networks import GEOMETRY
from tests.unit.serving.conftest import GOOD


class Context:
    """Stands for `RayServegRPCContext`."""

    def __init__(self, **metadata):
        self.metadata, self.code, self.details, self.trailing = metadata, grpc.StatusCode.OK, "", []

    def invocation_metadata(self):
        return list(self.metadata.items())

    def set_code(self, code):
        self.code = code

    def set_details(self, details):
        self.details = details

    def set_trailing_metadata(self, metadata):
        self.trailing = metadata


@pytest.fixture
def ask(client):
    """A function that has the service answer a message of the client's library: its response, and the context."""
    return asking(client)


def asking(client, *keys):
    """See `ask`; requests need one of the keys, if there are some."""
    gate = GrpcGate(client.app.service, Keys([*keys]))

    def ask(method, request, **metadata):
        context = Context(**metadata)
        response = client.portal.call(gate.answer, method, request.SerializeToString(), context)
        return getattr(service_pb2, f"{method}Response").FromString(response.SerializeToString()), context

    return ask


def infer_request(name, array, *, outputs=None, **fields):
    tensor = tritonclient.grpc.InferInput(name, list(array.shape), "UINT8" if array.dtype == np.uint8 else "BYTES")
    tensor.set_data_from_numpy(array)
    raw = tensor._get_content()
    return service_pb2.ModelInferRequest(
        model_name="colours", inputs=[tensor._get_tensor()], raw_input_contents=[raw],
        outputs=[output._get_tensor() for output in outputs or []], **fields,
    )  # fmt: skip


def test_the_messages_are_those_of_the_protocol():
    assert grpc_messages.SERVICE in service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
    for name, fields in grpc_messages._MESSAGES.items():
        theirs = service_pb2
        for part in name.split("."):
            theirs = getattr(theirs, part)
        ours = message_class(name).DESCRIPTOR.fields_by_name
        assert set(ours) == set(fields)
        for field_name, field in ours.items():
            expected = theirs.DESCRIPTOR.fields_by_name[field_name]
            assert (field.number, field.type, field.is_repeated) == (
                expected.number, expected.type, expected.is_repeated
            ), (name, field_name)  # fmt: skip


def test_health_and_metadata(ask, client):
    assert ask("ServerLive", service_pb2.ServerLiveRequest())[0].live
    assert ask("ServerReady", service_pb2.ServerReadyRequest())[0].ready
    assert ask("ModelReady", service_pb2.ModelReadyRequest(name="colours"))[0].ready
    server, _ = ask("ServerMetadata", service_pb2.ServerMetadataRequest())
    assert (server.name, list(server.extensions)) == ("cnnray", ["binary_tensor_data", "classification"])
    model, _ = ask("ModelMetadata", service_pb2.ModelMetadataRequest(name="colours"))
    by_http = client.get("/v2/models/colours").json()
    assert (model.name, list(model.versions), model.platform) == (
        by_http["name"], by_http["versions"], by_http["platform"]
    )  # fmt: skip
    for ours, theirs in ((model.inputs, by_http["inputs"]), (model.outputs, by_http["outputs"])):
        described = [
            {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)} for tensor in ours
        ]
        assert described == theirs


def test_each_form_of_an_image_has_the_answer_of_predictor(ask, bundle):
    pixels = decode(GOOD, GEOMETRY)[None]
    (expected,) = Predictor(Bundle.load(bundle)).probabilities(pixels)
    encoded = infer_request("image_bytes", np.asarray([GOOD], object), id="7")
    typed = service_pb2.ModelInferRequest(model_name="colours", inputs=encoded.inputs)
    typed.inputs[0].contents.bytes_contents.append(GOOD)
    numbers = infer_request("image", pixels)
    typed_numbers = service_pb2.ModelInferRequest(model_name="colours", inputs=numbers.inputs)
    typed_numbers.inputs[0].contents.uint_contents.extend(pixels.ravel().tolist())
    for request in (encoded, typed, numbers, typed_numbers):
        response, context = ask("ModelInfer", request, **{"x-request-id": "mine"})
        assert context.code == grpc.StatusCode.OK, context.details
        assert context.trailing == [("x-request-id", "mine")]
        result = tritonclient.grpc.InferResult(response)
        assert (response.id, response.model_name) == (request.id, "colours")
        np.testing.assert_allclose(result.as_numpy("probabilities")[0], expected, atol=1e-5)
        best = ["red", "green", "blue"][expected.argmax()]
        assert result.as_numpy("label").tolist() == [best.encode()]
    ranked = [tritonclient.grpc.InferRequestedOutput("probabilities", class_count=2)]
    response, _ = ask("ModelInfer", infer_request("image", pixels, outputs=ranked))
    ((first, _),) = tritonclient.grpc.InferResult(response).as_numpy("probabilities")
    assert first.decode().split(":")[1:] == [str(expected.argmax()), best]


def test_the_awkward_set_has_the_answers_and_the_refusals_of_http(ask, expected):
    usable = {name: (data, answer) for name, (data, answer) in expected.items() if not isinstance(answer, BadImage)}
    for start in range(0, len(usable), 8):
        part = list(usable.values())[start : start + 8]
        request = infer_request("image_bytes", np.asarray([data for data, _ in part], object))
        response, context = ask("ModelInfer", request)
        assert context.code == grpc.StatusCode.OK, context.details
        labels = tritonclient.grpc.InferResult(response).as_numpy("label")
        assert [label.decode() for label in labels] == [answer.label for _, answer in part]
    for data, answer in expected.values():
        if isinstance(answer, BadImage):
            request = infer_request("image_bytes", np.asarray([GOOD, data], object))
            response, context = ask("ModelInfer", request)
            assert context.code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED)
            assert context.details.startswith("The image at index 1 cannot be used")
            assert not response.outputs


def refused():
    image = infer_request("image_bytes", np.asarray([GOOD], object))

    def changed(change):
        request = service_pb2.ModelInferRequest()
        request.CopyFrom(image)
        change(request)
        return request

    invalid, missing = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND
    large = grpc.StatusCode.RESOURCE_EXHAUSTED
    return [
        (changed(lambda request: setattr(request, "model_name", "mice")), missing, "There is no model 'mice'"),
        (changed(lambda request: setattr(request, "model_name", "m" * 10**6)), missing, "mmm...mmm"),
        (changed(lambda request: setattr(request, "model_version", "9")), missing, "has no version '9'"),
        (changed(lambda request: request.ClearField("inputs")), invalid, "0 inputs and 1 raw_input_contents"),
        (changed(lambda request: request.inputs.append(request.inputs[0])), invalid, "There are 2 inputs"),
        (changed(lambda request: setattr(request.inputs[0], "name", "x")), invalid, "The input is 'x'"),
        (changed(lambda request: setattr(request.inputs[0], "datatype", "FP32")), invalid, "'FP32'"),
        (changed(lambda request: request.inputs[0].ClearField("shape")), invalid, "1 to 32 images"),
        (changed(lambda request: request.inputs[0].shape.__setitem__(0, 33)), large, "1 to 32 images"),
        (changed(lambda request: request.inputs[0].shape.__setitem__(0, 2)), invalid, "has 1 elements"),
        (changed(lambda request: request.outputs.add(name="logits")), invalid, "There is no output 'logits'"),
        (changed(lambda request: request.raw_input_contents.append(b"")), invalid, "expected one"),
        (changed(lambda request: [request.outputs.add() for _ in range(17)]), large, "16 outputs"),
        (
            changed(lambda request: request.inputs[0].contents.bytes_contents.extend([b""] * 33)),
            large,
            "32 images",
        ),
        (changed(lambda request: request.raw_input_contents.__setitem__(0, b"\x09\0\0\0x")), invalid, "fill"),
        (infer_request("image", np.zeros((1, 2, 2, 3), np.uint8)), invalid, "image is [1, 2, 2, 3]; expected"),
        (infer_request("image_bytes", np.asarray([b"x" * 2**25], object)), large, "larger than the 33554432 bytes"),
    ]  # fmt: skip


@pytest.mark.parametrize("case", range(len(refused())))
def test_what_cannot_be_answered_gets_a_status_and_a_sentence(case, ask):
    request, code, sentence = refused()[case]
    response, context = ask("ModelInfer", request)
    assert (context.code, sentence in context.details) == (code, True), context.details
    assert not response.outputs


def test_bytes_that_are_no_message(client):
    gate, context = GrpcGate(client.app.service, Keys([])), Context()
    client.portal.call(gate.answer, "ModelInfer", b"\xff\xff\xff", context)
    assert (context.code, context.details) == (
        grpc.StatusCode.INVALID_ARGUMENT, "The message is no ModelInferRequest."
    )  # fmt: skip
    assert client.app.service.admission.bytes == 0


def test_pixels_that_are_no_bytes(ask):
    request = infer_request("image", decode(GOOD, GEOMETRY)[None])
    typed = service_pb2.ModelInferRequest(model_name="colours", inputs=request.inputs)
    typed.inputs[0].contents.uint_contents.extend([256] * 10)
    _, context = ask("ModelInfer", typed)
    assert "not integers from 0 to 255" in context.details


def test_the_api_key(client):
    ask = asking(client, Key(key="one", name="web", requests_per_second=1))
    image = infer_request("image_bytes", np.asarray([GOOD], object))
    assert ask("ServerLive", service_pb2.ServerLiveRequest())[0].live
    assert ask("ModelInfer", image)[1].code == grpc.StatusCode.UNAUTHENTICATED
    assert ask("ModelInfer", image, **{"x-api-key": "one"})[1].code == grpc.StatusCode.OK
    _, context = ask("ModelInfer", image, authorization="Bearer one")
    assert (context.code, "1 requests a second" in context.details) == (grpc.StatusCode.RESOURCE_EXHAUSTED, True)


def test_an_engine_that_fails_is_an_internal_error_and_is_logged(start_client, monkeypatch, caplog):
    client = start_client()
    (served,) = client.app.service.models.all

    def fail(images):
        raise RuntimeError("broken")

    monkeypatch.setattr(served.compute, "predict", fail)
    with caplog.at_level(logging.ERROR):
        _, context = asking(client)("ModelInfer", infer_request("image_bytes", np.asarray([GOOD], object)))
    assert (context.code, context.details) == (grpc.StatusCode.INTERNAL, "Internal error.")
    assert "broken" in caplog.text


def test_a_canary_is_chosen_by_its_key(start_client, bundle, newer):
    client = start_client(("colours", bundle, 0.5), ("colours", newer, 0.5))
    ask, image = asking(client), infer_request("image_bytes", np.asarray([GOOD], object))

    def version(key):
        return ask("ModelInfer", image, **{"x-canary-key": key})[0].model_version

    chosen = [version(str(number)) for number in range(12)]
    assert len(set(chosen)) == 2
    assert [version(str(number)) for number in range(12)] == chosen


def test_serve_registers_every_method():
    registered = []

    class Server:
        def add_generic_rpc_handlers(self, handlers):
            registered.extend(handlers)

    add_to_server(type("Servicer", (), dict.fromkeys(METHODS)), Server())
    (handler,) = registered
    assert handler.service_name() == grpc_messages.SERVICE
    assert handler._method_handlers.keys() == {f"/{grpc_messages.SERVICE}/{name}" for name in METHODS}


def test_a_client_that_leaves_is_recorded_as_such(client, monkeypatch):
    recorded = []
    service = client.app.service
    monkeypatch.setattr(service.metrics, "record_request", lambda *values: recorded.append(values[:2]))
    request = infer_request("image_bytes", np.asarray([GOOD], object)).SerializeToString()

    async def leave():
        answering = asyncio.create_task(GrpcGate(service, Keys([])).answer("ModelInfer", request, Context()))
        await asyncio.sleep(0)
        answering.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await answering

    client.portal.call(leave)
    assert recorded == [("/inference.GRPCInferenceService/ModelInfer", 499)]
    assert service.admission.bytes == 0
