"""Requests that the server must refuse, and the required contents of each refusal."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import httpx

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
MESSAGES = [{"role": "user", "content": "Hi"}]
NORMAL = {
    "prompt": "The capital of France is",
    "max_tokens": 3,
    "temperature": 0,
    "return_logits": {"dtype": "float32"},
    "cache_salt": "bad-input",
}


@dataclass(frozen=True)
class Bad:
    """A request, and the status, field and words that its refusal must have."""

    name: str
    path: str
    body: Any = None
    status: int = 400
    param: str | None = None
    says: str = ""
    raw: bytes | None = None
    method: str = "POST"


def normal_answer(client: httpx.Client) -> dict[str, Any]:
    """Return the answer that a well-behaved client gets."""
    response = client.post(COMPLETIONS, json=NORMAL)
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice


def check_refusal(client: httpx.Client, bad: Bad) -> None:
    """Send the request and check that the answer is OpenAI's error object and names the field at fault."""
    content = bad.raw if bad.raw is not None else json.dumps(bad.body).encode()
    headers = {"content-type": "application/json"}
    if bad.method != "POST":
        content = b""
    response = client.request(bad.method, bad.path, content=content, headers=headers)
    assert response.status_code == bad.status, response.text[:500]
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == ("not_found_error" if bad.status == 404 else "invalid_request_error")
    assert error["param"] == bad.param
    assert error["message"]
    assert len(error["message"]) < 500
    assert bad.says in error["message"]
    assert bad.param is None or bad.param.split("[")[0] in error["message"] or bad.status == 404
