"""Checks of a server's answers against its own OpenAPI document."""

from __future__ import annotations

from typing import Any

import httpx
import orjson
from jsonschema import Draft202012Validator


class Document:
    """A server's document.

    Statuses, media types, headers and schemas that the document does not name fail a test.
    """

    def __init__(self, content: bytes) -> None:
        self.json: Any = orjson.loads(content)

    @property
    def operations(self) -> dict[str, tuple[str, str, Any]]:
        """Method, path and operation object by operationId."""
        return {
            operation["operationId"]: (method, path, operation)
            for path, methods in self.json["paths"].items()
            for method, operation in methods.items()
        }

    def resolve(self, node: Any) -> Any:
        """Return the target of a reference, or a node that is no reference."""
        while "$ref" in node:
            target = self.json
            for part in node["$ref"].removeprefix("#/").split("/"):
                target = target[part]
            node = target
        return node

    def check(self, operation_id: str, response: httpx.Response) -> None:
        """Check an answer: its status and media type are documented, and its JSON fits their schema."""
        _, _, operation = self.operations[operation_id]
        documented = self.resolve(operation["responses"][str(response.status_code)])
        media_type = response.headers["content-type"].partition(";")[0]
        schema = documented["content"][media_type].get("schema")
        match media_type:
            case "application/json":
                self.validate(response.json(), schema)
            case "text/plain":
                self.validate(response.text, schema)
            case "text/event-stream":
                _, data = schema["properties"]["data"]["anyOf"]
                for event in events(response.text):
                    self.validate(event, data["contentSchema"])
            case _:
                assert schema is None

    def validate(self, instance: Any, schema: Any) -> None:
        """Check that an instance fits a schema of the document. Raises ValidationError."""
        Draft202012Validator({**schema, "components": self.json["components"]}).validate(instance)


def events(text: str) -> list[Any]:
    """Return the JSON of a stream's events; [DONE], which must come last, is left out."""
    lines = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [orjson.loads(line) for line in lines[:-1]]
