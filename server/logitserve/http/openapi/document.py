"""The document itself: the app's routes, joined with their descriptions in operations.py."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import Response
from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core.core_schema import WithDefaultSchema

from logitserve.config import ServerConfig
from logitserve.http.openapi.answers.base import ErrorAnswer
from logitserve.http.openapi.operations import EVENTS, JSON, OPERATIONS, Operation
from logitserve.http.openapi.refusals import HEADERS, REFUSALS, header_references, references
from logitserve.protocol.json_schema import with_options

Json = dict[str, Any]

SECURITY_SCHEMES: Json = {
    "bearer": {
        "type": "http",
        "scheme": "bearer",
        "description": "The key in `Authorization`, as OpenAI's clients send it.",
    },
    "api_key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}
REFERENCE = "#/components/schemas/{model}"
BODY = "body"


class OpenApiDocument:
    """Answers with the document.

    The document is made once, on a thread and at the first request, since making it takes long.
    """

    def __init__(self, app: FastAPI, config: ServerConfig) -> None:
        self._app = app
        self._config = config
        self._making = asyncio.Lock()
        self._content: bytes | None = None

    async def respond(self, _request: Request) -> Response:
        async with self._making:
            if self._content is None:
                self._content = await asyncio.to_thread(openapi_document, self._app, self._config)
        return Response(self._content, media_type="application/json")


def openapi_document(app: FastAPI, config: ServerConfig) -> bytes:
    """Return the document of a server with these options. Raises KeyError for a route that operations.py does not know."""
    routes = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
    schemas = _Schemas(config)
    paths = {
        path: {method: _describe(route, schemas) for method, route in methods.items()}
        for path, methods in routes["paths"].items()
    }
    keys: list[Json] = [{name: []} for name in SECURITY_SCHEMES]
    document = {
        "openapi": routes["openapi"],
        "info": routes["info"],
        "servers": [{"url": config.root_path or "/"}],
        # Where no key is configured, a request needs none.
        "security": keys if config.api_key or config.api_key_file else [*keys, {}],
        "paths": paths,
        "components": {
            "schemas": schemas.components,
            "responses": {refusal.name: refusal.response() for refusal in REFUSALS.values()},
            "headers": HEADERS,
            "securitySchemes": SECURITY_SCHEMES,
        },
    }
    return orjson.dumps(document)


def _describe(route: Json, schemas: _Schemas) -> Json:
    """Return FastAPI's operation object with the bodies, answers and refusals of its Operation."""
    name = route["operationId"]
    operation = OPERATIONS[name]
    described: Json = {
        key: route[key]
        for key in ("tags", "summary", "description", "operationId", "parameters")
        if key in route
    }
    if operation.body is not None:
        examples = {key: {"value": value} for key, value in operation.requests.items()}
        content = {"schema": schemas.reference(name, BODY), "examples": examples}
        described["requestBody"] = {"required": True, "content": {JSON: content}}
    described["responses"] = {"200": _success(name, operation, schemas), **references(operation.refusals)}
    if operation.is_open:
        described["security"] = []
    return described


def _success(name: str, operation: Operation, schemas: _Schemas) -> Json:
    content = {
        media_type: {} if answer is None else {"schema": schemas.reference(name, media_type)}
        for media_type, answer in operation.answers.items()
    }
    if EVENTS in content:
        content[EVENTS]["schema"] = _event(content[EVENTS]["schema"])
    response: Json = {
        "description": operation.description,
        "headers": header_references("X-Request-Id"),
        "content": content,
    }
    return {**response, "links": operation.links} if operation.links else response


def _event(data: Json) -> Json:
    """Return the schema of one server-sent event, in OpenAPI 3.2's words for its fields."""
    return {
        "type": "object",
        "description": "One event of the stream.",
        "properties": {
            "data": {
                "anyOf": [
                    {"type": "string", "enum": ["[DONE]"]},
                    {"type": "string", "contentMediaType": JSON, "contentSchema": data},
                ]
            }
        },
        "required": ["data"],
    }


class _Generator(GenerateJsonSchema):
    """pydantic's, without titles of fields, which repeat their names, and without defaults that say "nothing"."""

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ARG002
        return False

    def default_schema(self, schema: WithDefaultSchema) -> Json:
        described = super().default_schema(schema)
        if described.get("default") in (None, [], {}):
            described.pop("default", None)  # openapi-python-client takes no empty object here
        return described


class _Schemas:
    """The schemas of all bodies and answers, made together so that they share components."""

    def __init__(self, config: ServerConfig) -> None:
        types: dict[tuple[str, str], Any] = {}
        for name, operation in OPERATIONS.items():
            if operation.body is not None:
                types[name, BODY] = operation.body
            types.update({(name, kind): answer for kind, answer in operation.answers.items() if answer})
        # Items of one tuple, so that each class is read once.
        every: Any = tuple[(ErrorAnswer, *types.values())]  # type: ignore[misc]
        schema = TypeAdapter(every).json_schema(ref_template=REFERENCE, schema_generator=_Generator)
        _, *items = schema["prefixItems"]
        self._references = dict(zip(types, items, strict=True))
        self.components: Json = with_options(schema["$defs"], config)

    def reference(self, name: str, kind: str) -> Json:
        """Return the schema of an operation's body, or of its answer in a media type."""
        schema: Json = self._references[name, kind]
        return schema
