"""The messages of the Open Inference Protocol v2 over gRPC, as its specification numbers their fields.

They are in a pool of their own: a client's library in the same process may have messages of the same names.
"""

import functools
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

PACKAGE = "inference"
SERVICE = f"{PACKAGE}.GRPCInferenceService"

_MESSAGES: dict[str, dict[str, tuple[int, str]]] = {
    "ServerLiveRequest": {},
    "ServerLiveResponse": {"live": (1, "bool")},
    "ServerReadyRequest": {},
    "ServerReadyResponse": {"ready": (1, "bool")},
    "ModelReadyRequest": {"name": (1, "string"), "version": (2, "string")},
    "ModelReadyResponse": {"ready": (1, "bool")},
    "ServerMetadataRequest": {},
    "ServerMetadataResponse": {"name": (1, "string"), "version": (2, "string"), "extensions": (3, "string*")},
    "ModelMetadataRequest": {"name": (1, "string"), "version": (2, "string")},
    "ModelMetadataResponse": {
        "name": (1, "string"), "versions": (2, "string*"), "platform": (3, "string"),
        "inputs": (4, "TensorMetadata*"), "outputs": (5, "TensorMetadata*"),
    },
    "ModelMetadataResponse.TensorMetadata": {
        "name": (1, "string"), "datatype": (2, "string"), "shape": (3, "int64*"),
    },
    "ModelInferRequest": {
        "model_name": (1, "string"), "model_version": (2, "string"), "id": (3, "string"),
        "parameters": (4, "map"), "inputs": (5, "InferInputTensor*"), "outputs": (6, "InferRequestedOutputTensor*"),
        "raw_input_contents": (7, "bytes*"),
    },
    "ModelInferRequest.InferInputTensor": {
        "name": (1, "string"), "datatype": (2, "string"), "shape": (3, "int64*"), "parameters": (4, "map"),
        "contents": (5, "InferTensorContents"),
    },
    "ModelInferRequest.InferRequestedOutputTensor": {"name": (1, "string"), "parameters": (2, "map")},
    "ModelInferResponse": {
        "model_name": (1, "string"), "model_version": (2, "string"), "id": (3, "string"), "parameters": (4, "map"),
        "outputs": (5, "InferOutputTensor*"), "raw_output_contents": (6, "bytes*"),
    },
    "ModelInferResponse.InferOutputTensor": {
        "name": (1, "string"), "datatype": (2, "string"), "shape": (3, "int64*"), "parameters": (4, "map"),
        "contents": (5, "InferTensorContents"),
    },
    "InferParameter": {
        "bool_param": (1, "bool"), "int64_param": (2, "int64"), "string_param": (3, "string"),
        "double_param": (4, "double"), "uint64_param": (5, "uint64"),
    },
    "InferTensorContents": {
        "bool_contents": (1, "bool*"), "int_contents": (2, "int32*"), "int64_contents": (3, "int64*"),
        "uint_contents": (4, "uint32*"), "uint64_contents": (5, "uint64*"), "fp32_contents": (6, "float*"),
        "fp64_contents": (7, "double*"), "bytes_contents": (8, "bytes*"),
    },
}  # fmt: skip
"""By message: by field, its number and type; `*`: repeated; `map`: parameters by name."""

_Field = descriptor_pb2.FieldDescriptorProto


def _build_pool() -> descriptor_pool.DescriptorPool:
    file = descriptor_pb2.FileDescriptorProto(name="open_inference.proto", package=PACKAGE, syntax="proto3")
    by_name: dict[str, Any] = {}
    for name, fields in _MESSAGES.items():
        outer, _, inner = name.partition(".")
        message = by_name[outer].nested_type.add(name=inner) if inner else file.message_type.add(name=name)
        by_name[name] = message
        if name == "InferParameter":
            message.oneof_decl.add(name="parameter_choice")
        for field_name, (number, kind) in fields.items():
            if kind == "map":
                entry = message.nested_type.add(name="ParametersEntry")
                entry.options.map_entry = True
                _add_field(entry, name, "key", 1, "string")
                _add_field(entry, name, "value", 2, "InferParameter")
                kind = "ParametersEntry*"
            field = _add_field(message, name, field_name, number, kind)
            if name == "InferParameter":
                field.oneof_index = 0
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return pool


def _add_field(message: Any, path: str, name: str, number: int, kind: str) -> Any:
    scalar, repeated = kind.rstrip("*"), kind.endswith("*")
    field = message.field.add(name=name, number=number)
    field.label = _Field.LABEL_REPEATED if repeated else _Field.LABEL_OPTIONAL
    if scalar[0].islower():
        field.type = getattr(_Field, f"TYPE_{scalar.upper()}")
    else:
        field.type = _Field.TYPE_MESSAGE
        is_inner = scalar == "ParametersEntry" or f"{path}.{scalar}" in _MESSAGES
        field.type_name = f".{PACKAGE}.{path}.{scalar}" if is_inner else f".{PACKAGE}.{scalar}"
    return field


_POOL = _build_pool()


@functools.cache
def message_class(name: str) -> Any:
    """The class of a message of the protocol, by its name."""
    return message_factory.GetMessageClass(_POOL.FindMessageTypeByName(f"{PACKAGE}.{name}"))
