"""The OpenAPI document: valid, the same for everybody, and no stricter and no looser than validation."""

from __future__ import annotations

import contextlib
from typing import Any

import httpx
import orjson
import pytest
from jsonschema import ValidationError
from logitserve.config import ServerConfig
from logitserve.errors import ApiError
from logitserve.http.openapi.operations import OPERATIONS, Operation
from logitserve.http.openapi.refusals import REFUSALS
from openapi_checks import Document
from openapi_spec_validator import OpenAPIV31SpecValidator
from pydantic import ValidationError as PydanticError
from scripted_engine import App, OpenApp

pytestmark = pytest.mark.anyio

WITH_BODIES = {name: operation for name, operation in OPERATIONS.items() if operation.body is not None}
SCALARS: list[Any] = [None, True, 0, -1, 1.5, "", "none", "text", [], ["text"], {}, {"type": "text"}]


async def document_of(app: App, **headers: str) -> Document:
    return Document((await app.client.get("/openapi.json", headers=headers)).content)


def body_schema(document: Document, name: str) -> Any:
    _, _, operation = document.operations[name]
    return operation["requestBody"]["content"]["application/json"]["schema"]


async def test_the_document_is_valid(open_app: OpenApp) -> None:
    async with open_app() as app:
        document = await document_of(app)
    OpenAPIV31SpecValidator(document.json).validate()


async def test_every_reference_resolves_and_every_component_is_referred_to(open_app: OpenApp) -> None:
    async with open_app() as app:
        document = await document_of(app)
    found: set[str] = set()

    def visit(node: Any) -> None:
        if isinstance(node, dict):
            if "$ref" in node:
                document.resolve(node)
                found.add(node["$ref"])
            for value in node.values():
                visit(value)
        elif isinstance(node, list):
            for value in node:
                visit(value)

    visit(document.json)
    parts = document.json["components"]
    components = {
        f"#/components/{kind}/{name}" for kind in ("schemas", "responses", "headers") for name in parts[kind]
    }
    assert components == found


async def test_the_document_has_the_same_bytes_at_every_request(open_app: OpenApp) -> None:
    async with open_app() as app:
        contents = {(await app.client.get("/openapi.json")).content for _ in range(3)}
    async with open_app() as app:
        contents.add((await app.client.get("/openapi.json")).content)
    assert len(contents) == 1


async def test_the_document_tells_no_keys(open_app: OpenApp) -> None:
    async with open_app(api_key=["hush-hush"]) as app:
        answer = await app.client.get("/openapi.json", headers={"authorization": "Bearer hush-hush"})
    assert answer.status_code == 200
    assert b"hush" not in answer.content


@pytest.mark.parametrize("api_key", [[], ["hush-hush"]])
async def test_a_key_is_optional_where_none_is_configured_and_never_needed_by_probes(
    open_app: OpenApp, api_key: list[str]
) -> None:
    async with open_app(api_key=api_key) as app:
        document = await document_of(app, authorization="Bearer hush-hush")
    assert ({} in document.json["security"]) == (not api_key)
    open_operations = {
        name for name, (_, _, operation) in document.operations.items() if operation.get("security") == []
    }
    assert open_operations == {"health", "ready"}
    assert all(
        ("401" in operation["responses"]) == (name not in open_operations)
        for name, (_, _, operation) in document.operations.items()
    )


async def test_bounds_are_those_of_the_servers_options(open_app: OpenApp) -> None:
    async with open_app(max_n=7, max_stop=3, max_logit_bias=5) as app:
        schemas = (await document_of(app)).json["components"]["schemas"]
    fields = schemas["ChatBody"]["properties"]
    assert fields["n"]["anyOf"][0]["maximum"] == 7
    assert fields["stop"]["anyOf"][1]["maxItems"] == 3
    assert fields["logit_bias"]["anyOf"][0]["maxProperties"] == 5


@pytest.mark.parametrize(("name", "operation"), WITH_BODIES.items(), ids=WITH_BODIES)
async def test_a_body_has_every_field_that_validation_knows(
    open_app: OpenApp, name: str, operation: Operation
) -> None:
    async with open_app() as app:
        document = await document_of(app)
    schema = document.resolve(body_schema(document, name))
    assert operation.body is not None
    known = operation.body.model_fields.keys() | operation.body.ignored | operation.body.refused
    assert schema["properties"].keys() == known
    assert schema["additionalProperties"] is False


@pytest.mark.parametrize(("name", "operation"), WITH_BODIES.items(), ids=WITH_BODIES)
async def test_what_validation_takes_of_any_field_the_document_takes_too(
    open_app: OpenApp, name: str, operation: Operation
) -> None:
    async with open_app() as app:
        document = await document_of(app)
    schema = body_schema(document, name)
    assert operation.body is not None
    complete = next(iter(operation.requests.values()))
    taken = []
    for field in document.resolve(schema)["properties"]:
        for value in SCALARS:
            body = {**complete, field: value}
            with contextlib.suppress(PydanticError, ApiError):
                operation.body.model_validate(body, context=ServerConfig())
                taken.append(field)
                document.validate(body, schema)
    assert len(set(taken)) > len(operation.body.model_fields) // 2


@pytest.mark.parametrize(("name", "operation"), WITH_BODIES.items(), ids=WITH_BODIES)
async def test_the_documents_examples_fit_its_schemas(
    open_app: OpenApp, name: str, operation: Operation
) -> None:
    async with open_app() as app:
        document = await document_of(app)
    for example in operation.requests.values():
        document.validate(example, body_schema(document, name))


async def test_an_answer_with_a_member_that_nobody_documented_does_not_fit(open_app: OpenApp) -> None:
    async with open_app() as app:
        document = await document_of(app)
        answer = await app.client.get("/v1/models")
        document.check("list_models", answer)
        more = orjson.loads(answer.content)
        more["data"][0]["colour"] = "red"
        with pytest.raises(ValidationError):
            document.check("list_models", httpx.Response(200, json=more))


async def test_every_example_of_an_error_is_an_error_object(open_app: OpenApp) -> None:
    async with open_app() as app:
        document = await document_of(app)
    for refusal in REFUSALS.values():
        content = document.json["components"]["responses"][refusal.name]["content"]["application/json"]
        for example in content.get("examples", {}).values():
            document.validate(example["value"], content["schema"])
