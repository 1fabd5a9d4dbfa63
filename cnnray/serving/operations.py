"""The operations of the service, from which requests are routed and the API is described."""

import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from cnnray.serving.bodies import RequestError
from cnnray.serving.keys import API_KEY_FILE, is_public
from cnnray.serving.schema import CANARY_KEY_PARAMETER, Failure
from cnnray.serving.service import Service

Handler = Callable[[Service, Request], Awaitable[Any]]
"""Answers a request: a `Response`, or what its JSON is made of."""
BINARY = {"type": "string", "format": "binary"}
"""Schema of a file."""
Bodies = dict[str, type[BaseModel] | dict[str, Any]]
"""Schemas of a request's body by content type; a dictionary is the schema itself."""

FAILURES = {
    400: "There is no image, or the body cannot be read.",
    401: "The API key is missing or wrong.",
    403: "The key is not an admin's, the service was started without this, or an image is not below --jobs-from.",
    404: "There is no such model, version, class or job.",
    408: "The body did not arrive in time.",
    413: "The body, the image or the number of images is too large.",
    415: "The body is not an image of a supported type.",
    422: "The image is damaged, or a parameter is out of range.",
    429: "The API key is over its requests per second: Retry-After says how long to wait.",
    500: "The output of the network is not a probability distribution, or the service has a bug.",
    503: "The service is overloaded, too slow or starting: try again.",
}
"""By status of a response that is a `Failure`, what it means."""
USUAL_FAILURES = (400, 401, 404, 408, 413, 415, 422, 429, 500, 503)
_REFERENCE = "#/components/schemas/{model}"
_KEY_SCHEMES = {
    "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    "bearer": {"type": "http", "scheme": "bearer"},
}
"""How a request sends its API key, as OpenAPI describes it."""


class Operation(Route):
    """A method of a path: how it is answered, and how it is described.

    Attributes:
        query: model of the parameters in the address; None: there are none.
        bodies: what a request may have as its body; empty: it has none.
        answer: type of the response's JSON, or schemas of a file by content type; None: the response is neither, and
            the operation is not described.
        failures: statuses of `FAILURES` that it may have.
        tag: heading under which it is described.
        for_admins: whether it needs the key of an admin.
        status: of its answer, unless the handler makes the whole response.
    """

    def __init__(
        self,
        method: str,
        path: str,
        handler: Handler,
        *,
        query: type[BaseModel] | None = None,
        bodies: Bodies | None = None,
        answer: Any = dict[str, Any],
        failures: Sequence[int] = USUAL_FAILURES,
        tag: str | None = None,
        for_admins: bool = False,
        status: int = 200,
    ) -> None:
        super().__init__(path, handler, methods=[method])
        self.methods = {method}  # of GET, Route makes GET and HEAD
        self._handler = handler
        self.method, self.query, self.bodies, self.answer = method, query, bodies or {}, answer
        self.failures, self.tag, self.for_admins, self.status = failures, tag, for_admins, status

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See Starlette. The application has put its service into the scope."""
        if scope["method"] != self.method:
            raise HTTPException(405, headers={"Allow": self.method})
        scope["route"] = self
        if self.for_admins and not getattr(scope.get("key"), "admin", False):
            raise RequestError(403, f"This needs the key of an admin, from the file that {API_KEY_FILE} names.")
        content = await self._handler(scope["service"], Request(scope, receive))
        if isinstance(content, BaseModel):  # by pydantic, whose JSON has null for a number that is not finite
            content = Response(content.model_dump_json(by_alias=True), self.status, media_type="application/json")
        response = content if isinstance(content, Response) else JSONResponse(content, self.status)
        await response(scope, receive, send)


def describe(
    operations: Sequence[Operation], *, title: str, version: str, description: str, needs_key: bool
) -> dict[str, Any]:
    """The description of the operations by OpenAPI 3.1."""
    described = [operation for operation in operations if operation.answer is not None]
    bodies = {body for operation in described for body in operation.bodies.values() if isinstance(body, type)}
    _, of_bodies = models_json_schema([(body, "validation") for body in bodies], ref_template=_REFERENCE)
    answers, of_answers = TypeAdapter.json_schemas(
        [
            (number, "serialization", TypeAdapter(operation.answer))
            for number, operation in enumerate(described)
            if not isinstance(operation.answer, dict)
        ] + [("failure", "serialization", TypeAdapter(Failure))],
        ref_template=_REFERENCE,
    )  # fmt: skip
    paths: dict[str, dict[str, Any]] = {}
    for number, operation in enumerate(described):
        method = operation.method.lower()
        failure = answers["failure", "serialization"]
        answer = operation.answer
        success = (
            {"description": "The answer.", "content": {kind: {"schema": schema} for kind, schema in answer.items()}}
            if isinstance(answer, dict)
            else _response("The answer.", answers[number, "serialization"])
        )
        responses = {str(operation.status): success} | {
            str(status): _response(FAILURES[status], failure) for status in operation.failures
        }
        summary = (operation.endpoint.__doc__ or "").strip().splitlines()[0]
        entry = {
            "operationId": re.sub(r"\W+", "_", f"{method}{operation.path}").strip("_"),
            "summary": summary,
            "parameters": _parameters(operation),
            "responses": responses,
        }
        if needs_key and is_public(operation.path):
            entry["security"] = []
        if operation.tag:
            entry["tags"] = [operation.tag]
        if operation.bodies:
            content = {kind: {"schema": _schema(body)} for kind, body in operation.bodies.items()}
            entry["requestBody"] = {"required": True, "content": content}
        paths.setdefault(operation.path_format, {})[method] = entry
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": version, "description": description},
        "paths": paths,
        "components": {"schemas": of_bodies.get("$defs", {}) | of_answers.get("$defs", {})}
        | ({"securitySchemes": _KEY_SCHEMES} if needs_key else {}),
    } | ({"security": [{name: []} for name in _KEY_SCHEMES]} if needs_key else {})


def _schema(body: type[BaseModel] | dict[str, Any]) -> dict[str, Any]:
    return {"$ref": _REFERENCE.format(model=body.__name__)} if isinstance(body, type) else body


def _response(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _parameters(operation: Operation) -> list[dict[str, Any]]:
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in operation.param_convertors
    ]
    if operation.query:
        schema = operation.query.model_json_schema()
        parameters += [
            {"name": name, "in": "query", "required": False, "schema": values, "description": values["description"]}
            for name, values in schema["properties"].items()
        ]
    named = operation.param_convertors
    chooses = "version" not in named and ("model" in named or operation.query)
    return parameters + ([CANARY_KEY_PARAMETER] if chooses else [])
