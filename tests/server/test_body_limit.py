"""Bodies over the byte limit."""

from __future__ import annotations

import pytest
from scripted_engine import OpenApp

pytestmark = pytest.mark.anyio


async def test_a_body_over_the_limit_is_refused_before_it_is_parsed(open_app: OpenApp) -> None:
    async with open_app(max_body_bytes=100) as app:
        answer = await app.post("/v1/completions", {"prompt": "x" * 200})
    assert answer.status_code == 413
