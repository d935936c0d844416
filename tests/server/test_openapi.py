"""The OpenAPI document: valid, the same for every client, and no stricter and no looser than validation."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import httpx
import pytest
from jsonschema import ValidationError
from logitengine.link.messages import ModelInfo
from logitserve.config import ServerConfig
from logitserve.errors import ApiError
from logitserve.http.app import create_app
from logitserve.http.openapi.operations import OPERATIONS, Operation
from logitserve.http.openapi.refusals import REFUSALS
from openapi_checks import Document
from openapi_spec_validator import OpenAPIV31SpecValidator
from pydantic import ValidationError as PydanticError
from scripted_engine import ScriptedEngine

WITH_BODIES = {name: operation for name, operation in OPERATIONS.items() if operation.body is not None}
SCALARS: list[Any] = [None, True, 0, -1, 1.5, "", "none", "text", [], ["text"], {}, {"type": "text"}]


def content_of(model_info: ModelInfo, **options: Any) -> bytes:
    """Return the document of an app with these options, before its model is loaded."""
    app = create_app(ScriptedEngine(model_info, lambda _: []), ServerConfig(**options))

    async def get() -> bytes:
        transport = httpx.ASGITransport(app=app)
        headers = {"authorization": f"Bearer {options['api_key'][0]}"} if options.get("api_key") else {}
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            first, second = [await client.get("/openapi.json", headers=headers) for _ in range(2)]
        assert first.status_code == 200
        assert first.headers["content-type"] == "application/json"
        assert first.content == second.content
        return first.content

    return asyncio.run(get())


@pytest.fixture(scope="module")
def document(model_info: ModelInfo) -> Document:
    """The document of a server without options."""
    return Document(content_of(model_info))


def body_schema(document: Document, name: str) -> Any:
    _, _, operation = document.operations[name]
    return operation["requestBody"]["content"]["application/json"]["schema"]


def test_the_document_is_valid(document: Document) -> None:
    OpenAPIV31SpecValidator(document.json).validate()


def test_every_reference_resolves_and_every_component_is_referred_to(document: Document) -> None:
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


def test_the_document_has_the_same_bytes_from_every_server(model_info: ModelInfo) -> None:
    assert content_of(model_info) == content_of(model_info)


def test_the_document_tells_no_keys(model_info: ModelInfo) -> None:
    assert b"hush" not in content_of(model_info, api_key=["hush-hush"])


@pytest.mark.parametrize("api_key", [[], ["hush-hush"]])
def test_a_key_is_optional_where_none_is_configured_and_never_needed_by_probes(
    model_info: ModelInfo, api_key: list[str]
) -> None:
    document = Document(content_of(model_info, api_key=api_key))
    assert ({} in document.json["security"]) == (not api_key)
    open_operations = {
        name for name, (_, _, operation) in document.operations.items() if operation.get("security") == []
    }
    assert open_operations == {"health", "ready"}
    assert all(
        ("401" in operation["responses"]) == (name not in open_operations)
        for name, (_, _, operation) in document.operations.items()
    )


def test_bounds_are_those_of_the_servers_options(model_info: ModelInfo) -> None:
    document = Document(content_of(model_info, max_n=7, max_stop=3, max_logit_bias=5))
    fields = document.json["components"]["schemas"]["ChatBody"]["properties"]
    assert fields["n"]["anyOf"][0]["maximum"] == 7
    assert fields["stop"]["anyOf"][1]["maxItems"] == 3
    assert fields["logit_bias"]["anyOf"][0]["maxProperties"] == 5


@pytest.mark.parametrize(("name", "operation"), WITH_BODIES.items(), ids=WITH_BODIES)
def test_a_body_has_every_field_that_validation_knows(
    document: Document, name: str, operation: Operation
) -> None:
    schema = document.resolve(body_schema(document, name))
    assert operation.body is not None
    known = operation.body.model_fields.keys() | operation.body.ignored | operation.body.refused
    assert schema["properties"].keys() == known
    assert schema["additionalProperties"] is False


@pytest.mark.parametrize(("name", "operation"), WITH_BODIES.items(), ids=WITH_BODIES)
def test_what_validation_takes_of_any_field_the_document_takes_too(
    document: Document, name: str, operation: Operation
) -> None:
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
def test_the_documents_examples_fit_its_schemas(document: Document, name: str, operation: Operation) -> None:
    for example in operation.requests.values():
        document.validate(example, body_schema(document, name))


def test_an_answer_with_a_member_that_nobody_documented_does_not_fit(document: Document) -> None:
    document.check("version", httpx.Response(200, json={"version": "1"}))
    with pytest.raises(ValidationError):
        document.check("version", httpx.Response(200, json={"version": "1", "colour": "red"}))


def test_every_example_of_an_error_is_an_error_object(document: Document) -> None:
    for refusal in REFUSALS.values():
        content = document.json["components"]["responses"][refusal.name]["content"]["application/json"]
        for example in content.get("examples", {}).values():
            document.validate(example["value"], content["schema"])
