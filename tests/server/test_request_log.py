"""Request ids and log lines."""

from __future__ import annotations

import logging

import pytest
from logitengine.link.messages import GenerationRequest, StepOutput
from scripted_engine import OpenApp, Step

pytestmark = pytest.mark.anyio

BODY = {"prompt": "a secret prompt", "max_tokens": 3}


def one_token(request: GenerationRequest) -> list[Step]:
    return [StepOutput(request_id=request.request_id, index=0, token_ids=[33], finish_reason="length")]


async def test_a_log_line_has_the_id_and_the_tokens_and_no_text(
    open_app: OpenApp, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        async with open_app(one_token) as app:
            answer = await app.post("/v1/completions", BODY, headers={"x-request-id": "my-id"})
    (record,) = [record for record in caplog.records if getattr(record, "request_id", None) == "my-id"]
    assert answer.headers["x-request-id"] == "my-id"
    line = vars(record)
    assert (line["path"], line["status"], line["completion_tokens"]) == ("/v1/completions", 200, 1)
    assert line["answer_id"] == answer.json()["id"]
    assert "secret" not in caplog.text
