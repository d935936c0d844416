"""Requests whose answers have a form, and the scripted engine that answers them."""

from __future__ import annotations

from typing import Any

from httpx import Response
from logitengine.link.messages import GenerationRequest, StepOutput
from scripted_engine import Step

CHAT = "/v1/chat/completions"


def one_token(request: GenerationRequest) -> list[Step]:
    return [StepOutput(request_id=request.request_id, index=0, token_ids=[28], finish_reason="length")]


def body(path: str, **fields: Any) -> dict[str, Any]:
    prompt: dict[str, dict[str, Any]] = {
        CHAT: {"messages": [{"role": "user", "content": "Hi"}]},
        "/v1/completions": {"prompt": "Hi"},
        "/v1/logits": {"input": "Hi", "positions": "generated"},
    }
    return {**prompt[path], "max_tokens": 1, **fields}


def json_schema(schema: Any, **members: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, **members}}


def refused_with(answer: Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    return error
