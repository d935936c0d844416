"""A prefix under which a proxy offers the server, and proxies that take it off or leave it."""

from __future__ import annotations

import pytest
from logitserve.config import ServerConfig
from pydantic import ValidationError
from scripted_engine import OpenApp

pytestmark = pytest.mark.anyio

ROOT = "/models/small"
KEY = {"authorization": "Bearer right"}


@pytest.mark.parametrize("prefix", [ROOT, ""], ids=["left", "taken off"])
async def test_routes_probes_and_the_key_hold_under_the_prefix(open_app: OpenApp, prefix: str) -> None:
    async with open_app(root_path=ROOT, api_key=["right"], on_loopback=True) as app:
        foreign = {"host": "evil.example"}
        for probe in ("/health", "/ready"):
            assert (await app.client.get(prefix + probe, headers=foreign)).status_code == 200
        assert (await app.client.get(f"{prefix}/version", headers={"host": "localhost"})).status_code == 401
        assert (await app.client.get(f"{prefix}/version", headers={**foreign, **KEY})).status_code == 421
        for path in ("/version", "/v1/models", "/v1/models/scripted", "/openapi.json"):
            answer = await app.client.get(prefix + path, headers={"host": "localhost", **KEY})
            assert answer.status_code == 200, answer.text
        document = (
            await app.client.get(f"{prefix}/openapi.json", headers={"host": "localhost", **KEY})
        ).json()
        assert document["servers"] == [{"url": ROOT}]
        app.state.draining = True
        assert (await app.client.get(f"{prefix}/health")).status_code == 200


@pytest.mark.parametrize("root", ["", ROOT, "/health/x"])
@pytest.mark.parametrize(
    "path",
    [
        "//health",
        "/health/",
        "/health/../version",
        "/health%2f",
        "/health;x",
        "/Health",
        "/%2fhealth",
        f"{ROOT}{ROOT}/health",
        f"{ROOT}//health",
        f"{ROOT}health",
        f"{ROOT}/",
        "/health/version",
        "/ready/health/version",
    ],
)
async def test_no_path_that_looks_like_a_probe_passes_without_the_key(
    open_app: OpenApp, root: str, path: str
) -> None:
    """A path that the key gate lets pass is a probe for the router too, under any prefix."""
    async with open_app(root_path=root, api_key=["right"]) as app:
        answer = await app.client.get(path)
        assert answer.status_code == 401
        # With the key no other route answers either: the gate and the router see one path.
        assert (await app.client.get(path, headers=KEY)).json() != {"status": "ok"}


async def test_no_header_changes_the_path_that_the_key_gate_sees(open_app: OpenApp) -> None:
    """CVE-2026-48746: a Host header with a path in it made the request look like one for an open path."""
    async with open_app(api_key=["right"]) as app:
        for headers in (
            {"host": "test/health?"},
            {"host": "/health"},
            {"x-forwarded-prefix": "/health"},
            {"x-original-url": "/health"},
            {"x-rewrite-url": "/health"},
            {"x-forwarded-host": "test/health"},
        ):
            answer = await app.client.get("/version", headers=headers)
            assert answer.status_code in {400, 401}
            assert "version" not in answer.json()


@pytest.mark.parametrize(
    "root_path",
    ["v", "//v", "/a b", "/a?b", "/%61", "/a/../b", "/v1", "/v1/", "/v1/x", "/health", "/ready/", "/ü"],
)
def test_a_prefix_that_cannot_be_told_from_a_path_is_refused(root_path: str) -> None:
    with pytest.raises(ValidationError, match=r"must "):
        ServerConfig(root_path=root_path)


def test_a_slash_at_the_end_of_the_prefix_means_nothing() -> None:
    assert ServerConfig(root_path="/a/").root_path == "/a"
    assert not ServerConfig(root_path="/").root_path


async def test_every_own_path_is_one_that_no_root_path_may_be(open_app: OpenApp) -> None:
    async with open_app() as app:
        document = (await app.client.get("/openapi.json")).json()
    for path in ["/openapi.json", *document["paths"]]:
        with pytest.raises(ValidationError, match="own paths"):
            ServerConfig(root_path=path.replace("{name}", "a"))
