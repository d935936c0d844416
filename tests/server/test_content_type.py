"""Media types of bodies: JSON under its names, the type of curl -d, and none."""

from __future__ import annotations

import pytest
from logitengine.link.messages import GenerationRequest, StepOutput
from scripted_engine import OpenApp, Step

pytestmark = pytest.mark.anyio

BODY = b'{"prompt": "Hi", "max_tokens": 1}'
FORM = "application/x-www-form-urlencoded"
OWN = {"origin": "http://127.0.0.1:8000", "host": "127.0.0.1:8000"}


def one_token(request: GenerationRequest) -> list[Step]:
    return [StepOutput(request_id=request.request_id, index=0, token_ids=[33], finish_reason="length")]


@pytest.mark.parametrize(
    ("content_type", "from_page", "expected"),
    [
        ("application/json", True, 200),
        ("application/json; charset=utf-8", True, 200),
        ("Application/JSON;charset=UTF-8", False, 200),
        ("application/vnd.api+json", True, 200),
        (None, False, 200),
        (None, True, 200),
        (FORM, False, 200),
        (f"{FORM}; charset=UTF-8", False, 200),
        (FORM, True, 415),
        ("text/plain", False, 415),
        ("text/plain;charset=UTF-8", True, 415),
        ("text/plain; application/json", True, 415),
        ("text/json", False, 415),
        ("multipart/form-data; boundary=x", False, 415),
        ("application/json, text/plain", True, 415),
        ("application/jsonx", True, 415),
        ("application/octet-stream", False, 415),
    ],
)
async def test_a_body_is_taken_by_its_media_type(
    open_app: OpenApp, content_type: str | None, from_page: bool, expected: int
) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    if from_page:
        headers |= OWN
    async with open_app(one_token) as app:
        answer = await app.client.post("/v1/completions", content=BODY, headers=headers)
    assert answer.status_code == expected, answer.text
    if expected == 415:
        assert content_type is not None
        error = answer.json()["error"]
        assert error["code"] == "unsupported_media_type"
        assert f"'{content_type.partition(';')[0]}'" in error["message"]
        assert "application/json" in error["message"]


@pytest.mark.parametrize("first", ["application/json", "text/plain"])
async def test_no_second_media_type_hides_the_first(open_app: OpenApp, first: str) -> None:
    second = "text/plain" if first == "application/json" else "application/json"
    async with open_app(one_token) as app:
        answer = await app.client.post(
            "/v1/completions", content=BODY, headers=[("content-type", first), ("content-type", second)]
        )
    assert answer.status_code == 415


@pytest.mark.parametrize(
    "path",
    [
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/logits",
        "/v1/perplexity",
        "/v1/rewards",
        "/v1/embeddings",
        "/pooling",
        "/tokenize",
        "/detokenize",
    ],
)
async def test_every_route_that_reads_a_body_asks(open_app: OpenApp, path: str) -> None:
    async with open_app(one_token) as app:
        answer = await app.client.post(path, content=BODY, headers={"content-type": "text/plain"})
    assert answer.status_code == 415
