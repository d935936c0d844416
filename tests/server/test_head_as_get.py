"""HEAD wherever GET is: the same head, no body, and no HEAD in the document."""

from __future__ import annotations

import pytest
from scripted_engine import OpenApp

pytestmark = pytest.mark.anyio

VARYING = {"x-request-id"}


async def test_head_has_the_head_of_get(open_app: OpenApp) -> None:
    async with open_app() as app:
        document = (await app.client.get("/openapi.json")).json()
        paths = [path for path, operations in document["paths"].items() if "get" in operations]
        assert "/health" in paths
        for path in [*paths, "/openapi.json", "/nope"]:
            got = await app.client.get(path)
            head = await app.client.head(path)
            assert head.status_code == got.status_code
            assert head.content == b""
            # Each request changes the metrics, and so the length of their page.
            varying = VARYING | {"content-length"} if path == "/metrics" else VARYING
            assert {name: value for name, value in head.headers.items() if name not in varying} == {
                name: value for name, value in got.headers.items() if name not in varying
            }


async def test_head_is_not_allowed_where_get_is_not(open_app: OpenApp) -> None:
    async with open_app() as app:
        head = await app.client.head("/v1/completions")
    assert (head.status_code, head.headers["allow"], head.content) == (405, "POST", b"")


async def test_the_document_has_no_head(open_app: OpenApp) -> None:
    async with open_app() as app:
        document = (await app.client.get("/openapi.json")).json()
    assert not any("head" in operations for operations in document["paths"].values())
