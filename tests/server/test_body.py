"""Bodies with more values than the server parses.

A parser holds up every other request for as long as it makes objects.
"""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from logitserve.http.body import CONTAINER_WEIGHT
from scripted_engine import OpenApp

pytestmark = pytest.mark.anyio

LIMIT = 100


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Record the bodies that the parser gets."""
    given: list[bytes] = []
    loads = orjson.loads

    def spying_loads(data: bytes) -> Any:
        given.append(data)
        return loads(data)

    monkeypatch.setattr(orjson, "loads", spying_loads)
    return given


@pytest.mark.parametrize(
    "body",
    [
        b"[" + b"0," * LIMIT + b"0]",
        b"[" + b"[]," * LIMIT + b"0]",
        b"[" + b"{}," * LIMIT + b"0]",
        b"[" * (LIMIT + 1),
        b'{"a":' * (LIMIT + 1),
    ],
    ids=["numbers", "lists", "objects", "nested lists", "nested objects"],
)
async def test_a_body_of_too_many_values_is_refused_before_it_is_parsed(
    open_app: OpenApp, parsed: list[bytes], body: bytes
) -> None:
    async with open_app(max_body_values=LIMIT) as app:
        parsed.clear()
        answer = await app.client.post("/v1/completions", content=body)
        assert parsed == []
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "too_many_values", None)
    assert str(LIMIT) in error["message"]
    assert "--max-body-values" in error["message"]


async def test_a_body_of_as_many_values_as_are_allowed_is_parsed(
    open_app: OpenApp, parsed: list[bytes]
) -> None:
    body = b"[" + b"0," * (LIMIT - CONTAINER_WEIGHT) + b"0]"
    async with open_app(max_body_values=LIMIT) as app:
        parsed.clear()
        answer = await app.client.post("/v1/completions", content=body)
        assert parsed == [body]
    assert answer.json()["error"]["code"] != "too_many_values"


async def test_eight_megabytes_of_empty_lists_are_over_the_default(
    open_app: OpenApp, parsed: list[bytes]
) -> None:
    async with open_app() as app:
        parsed.clear()
        answer = await app.client.post("/tokenize", content=b'{"tokens": [' + b"[]," * (5 << 19) + b"0]}")
        assert parsed == []
    assert answer.json()["error"]["code"] == "too_many_values"
