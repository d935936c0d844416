"""Every path but the probes needs a key."""

from __future__ import annotations

import pytest
from scripted_engine import OpenApp

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    "path", ["/v1/models", "/version", "/tokenize", "/openapi.json", "/nope", "//health", "/health/"]
)
async def test_every_path_but_the_probes_needs_the_key(open_app: OpenApp, path: str) -> None:
    async with open_app(api_key=["right", "second"]) as app:
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "right"},
            {"authorization": "Basic right"},
            {"host": "/health"},
        ):
            answer = await app.client.get(path, headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
        for key in ("right", "second"):
            answer = await app.client.get(path, headers={"authorization": f"Bearer {key}"})
            assert answer.status_code != 401
        assert (await app.client.get("/health")).status_code == 200
        assert (await app.client.get("/ready")).status_code == 200


async def test_a_key_in_other_letters_is_refused_and_breaks_nothing(open_app: OpenApp) -> None:
    async with open_app(api_key=["right"]) as app:
        answer = await app.client.get("/version", headers={b"authorization": "Bearer ключ".encode()})
    assert answer.status_code == 401
