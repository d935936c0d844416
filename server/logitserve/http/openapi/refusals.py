"""Refusals as the document's shared responses: one for each status, with OpenAI's error object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from logitserve.errors import ApiError, BadRequestError, not_ready

Json = dict[str, Any]

HEADERS: dict[str, Json] = {
    "Retry-After": {
        "description": "Seconds to wait before the next try.",
        "schema": {"type": "integer", "minimum": 0},
    },
    "X-Should-Retry": {
        "description": "`false`: the same request would fail again.",
        "schema": {"type": "string", "enum": ["true", "false"]},
    },
    "Allow": {"description": "Methods that the path takes.", "schema": {"type": "string"}},
    "WWW-Authenticate": {"description": "How to send a key.", "schema": {"type": "string"}},
    "X-Request-Id": {
        "description": "The request's own X-Request-Id where it is short and plain, or a fresh one: the log has it.",
        "schema": {"type": "string"},
    },
}


@dataclass(frozen=True)
class Refusal:
    """A status that requests are refused with. ``name`` is the name of the document's response."""

    name: str
    description: str
    headers: Sequence[str] = ()
    examples: dict[str, ApiError] = field(default_factory=dict)

    def response(self) -> Json:
        content: Json = {"schema": {"$ref": "#/components/schemas/ErrorAnswer"}}
        if self.examples:
            content["examples"] = {name: {"value": error.body()} for name, error in self.examples.items()}
        return {
            "description": self.description,
            "headers": header_references("X-Request-Id", *self.headers),
            "content": {"application/json": content},
        }


REFUSALS = {
    400: Refusal(
        "BadRequest",
        "A field is unknown, missing or out of its bounds; `param` names it.",
        examples={
            "unknown_field": BadRequestError(
                "Unknown field: 'colour'.", param="colour", code="unknown_parameter"
            ),
            "out_of_bounds": BadRequestError("'n' is 100; this server allows at most 32.", param="n"),
        },
    ),
    401: Refusal("Unauthorized", "A key is needed, and none or another was sent.", ("WWW-Authenticate",)),
    403: Refusal("ForeignOrigin", "A web page of an origin that is not allowed asked: `--cors-origin`."),
    404: Refusal("NotFound", "The server has no such model or head."),
    405: Refusal("MethodNotAllowed", "The path takes other methods.", ("Allow",)),
    408: Refusal("RequestTimeout", "The request did not arrive in time."),
    413: Refusal("TooLarge", "The body is larger than `--max-body-bytes`."),
    415: Refusal("UnsupportedMediaType", "The body is not JSON, or encoded in a way that is not known."),
    421: Refusal("ForeignHost", "The Host header names another server: `--allowed-host`."),
    429: Refusal(
        "TooManyRequests", "The queue is full, or too much is held for other requests.", ("Retry-After",)
    ),
    431: Refusal("HeadTooLarge", "The request's head is larger than `--max-header-bytes`."),
    500: Refusal("InternalError", "The server failed in a way that nobody foresaw."),
    501: Refusal(
        "NotImplemented", "The Transfer-Encoding is not `chunked`, or the model's images cannot be prepared."
    ),
    503: Refusal(
        "NotReady",
        "No requests are served at the moment: loading, draining, restarting, or waited too long.",
        ("Retry-After",),
        {"loading": not_ready("loading the model")},
    ),
    505: Refusal("VersionNotSupported", "The request is not HTTP/1.1 or HTTP/1.0."),
    504: Refusal("TooLong", "The answer took longer than a request may.", ("X-Should-Retry",)),
}


def header_references(*names: str) -> Json:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def references(statuses: frozenset[int]) -> Json:
    """Return the responses of an operation that may be refused with ``statuses``."""
    return {
        str(status): {"$ref": f"#/components/responses/{REFUSALS[status].name}"}
        for status in sorted(statuses)
    }
