"""Requests that some servers answer wrongly, sent by curl, aiohttp, httpx, urllib and Node's fetch."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest
from http_clients import CLIENTS, Answered, Send, Sent, by_curl
from live_server import serving

JSON = {"content-type": "application/json"}
HI = b'{"prompt": "Hi", "max_tokens": 1, "temperature": 0}'
APP = "app://editor"
SEPARATORS = "a\u2028b\u2029c\u0085d"
LONGEST_EVENT = 400_000
"""Most bytes of an event with more than one row."""


@pytest.fixture(scope="module")
def url(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("clients") / "server.log"
    with serving(log, str(tiny_llama), "--dtype", "float32", "--cors-origin", APP) as server:
        yield server.url


@pytest.fixture(params=list(CLIENTS.values()), ids=list(CLIENTS))
def send(request: pytest.FixtureRequest) -> Send:
    """Return the function that sends a request by a client, each in turn."""
    sender: Send = request.param
    return sender


def post(url: str, body: bytes, path: str = "/v1/completions", **headers: str) -> Sent:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Sent("POST", url + path, {**JSON, **named}, body)


def has_error(answer: Answered, status: int, code: str) -> bool:
    return answer.status == status and answer.json["error"]["code"] == code


def test_a_completion_is_answered(url: str, send: Send) -> None:
    answer = send(post(url, HI))
    assert answer.status == 200
    assert answer.json["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize("name", ["httpx", "aiohttp"])
def test_an_offer_to_upgrade_to_http_2_keeps_its_body(url: str, name: str) -> None:
    sent = post(url, HI, connection="Upgrade, HTTP2-Settings", upgrade="h2c", http2_settings="AAMAAABk")
    answer = CLIENTS[name](sent)
    assert answer.status == 200
    assert answer.json["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize("option", ["--http2", "--http1.1", "--http1.0"])
def test_curl_is_answered_in_each_version_that_it_offers(url: str, option: str) -> None:
    answer = by_curl(post(url, HI), option)
    assert answer.status == 200
    assert answer.json["usage"]["completion_tokens"] == 1


def test_curl_reads_a_stream_over_http_1_0_to_its_end(url: str) -> None:
    answer = by_curl(post(url, b'{"prompt": "Hi", "stream": true, "max_tokens": 2}'), "--http1.0", "--raw")
    assert answer.status == 200
    assert "transfer-encoding" not in answer.headers
    assert answer.body.startswith(b"data: {")
    assert answer.body.endswith(b"data: [DONE]\n\n")


def test_a_page_may_not_send_text_and_an_app_that_is_let_in_may_ask_first(url: str, send: Send) -> None:
    refused = send(Sent("POST", f"{url}/v1/completions", {"content-type": "text/plain"}, HI))
    assert refused.status == 415
    assert "text/plain" in refused.json["error"]["message"]


@pytest.mark.parametrize("name", ["httpx", "aiohttp", "urllib", "curl"])
def test_a_page_of_another_origin_is_refused(url: str, name: str) -> None:
    """A page's browser sets Origin and Host.

    Node's fetch is left out, because it does not allow setting Host.
    """
    foreign = CLIENTS[name](post(url, HI, origin="https://evil.example"))
    assert foreign.status == 403
    assert "--cors-origin" in foreign.json["error"]["message"]
    rebound = CLIENTS[name](post(url, HI, host="evil.example"))
    assert rebound.status == 421
    assert "--allowed-host" in rebound.json["error"]["message"]


@pytest.mark.parametrize("name", ["httpx", "aiohttp", "urllib", "curl"])
def test_a_preflight_of_a_configured_origin_is_answered(url: str, name: str) -> None:
    headers = {
        "origin": APP,
        "access-control-request-method": "POST",
        "access-control-request-headers": "content-type,authorization",
    }
    answer = CLIENTS[name](Sent("OPTIONS", f"{url}/v1/completions", headers))
    assert answer.status in {200, 204}
    assert answer.headers["access-control-allow-origin"] == APP
    assert "authorization" in answer.headers["access-control-allow-headers"].lower()


def test_a_gzipped_body_is_decoded(url: str, send: Send) -> None:
    answer = send(post(url, gzip.compress(HI), content_encoding="gzip"))
    assert answer.status == 200
    assert answer.json["usage"]["completion_tokens"] == 1


def test_another_encoding_is_refused_by_name(url: str, send: Send) -> None:
    answer = send(post(url, HI, content_encoding="br"))
    assert answer.status == 415
    assert "'br'" in answer.json["error"]["message"]


def test_head_is_answered_as_get_without_a_body(url: str, send: Send) -> None:
    answer = send(Sent("HEAD", f"{url}/health", {}))
    assert (answer.status, answer.body) == (200, b"")
    assert answer.headers["content-type"] == "application/json"


@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")  # aiohttp's advice to its user
def test_a_body_over_the_limit_is_answered(url: str, send: Send) -> None:
    assert has_error(send(post(url, b" " * 60_000_000)), 413, "request_too_large")


@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")
def test_many_values_of_the_wrong_type_are_refused_unread(url: str, send: Send) -> None:
    """1.3 million strings in ``stop_token_ids``. Read in full, they would take the server 7 s and 443 MiB."""
    body = b'{"prompt": "Hi", "stop_token_ids": [' + b'"a",' * 1_300_000 + b'"a"]}'
    assert has_error(send(post(url, body)), 400, "too_many_values")


def test_the_tokenizer_is_described(url: str, send: Send) -> None:
    answer = send(Sent("GET", f"{url}/tokenizer_info", {}))
    assert answer.status == 200
    assert {"eos_token", "bos_token", "pad_token", "chat_template"} <= answer.json.keys()


def test_a_path_that_does_not_exist_is_an_error_object(url: str, send: Send) -> None:
    assert has_error(send(Sent("GET", f"{url}/v1/nope", {})), 404, "not_found")


# Streams.


def chunks(lines: list[str]) -> list[Any]:
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    return [json.loads(line) for line in data[:-1]]


def test_line_separators_of_a_text_do_not_break_an_event(url: str) -> None:
    body = {"prompt": SEPARATORS, "echo": True, "max_tokens": 1, "stream": True}
    with httpx.Client(base_url=url, timeout=60) as client:
        with client.stream("POST", "/v1/completions", json=body) as response:
            streamed = chunks(list(response.iter_lines()))
        tokens = client.post("/tokenize", json={"prompt": SEPARATORS}).json()["tokens"]
        expected = client.post("/detokenize", json={"tokens": tokens}).json()["prompt"]
    text = "".join(chunk["choices"][0]["text"] for chunk in streamed)
    assert text.startswith(expected)
    assert "\u2028" in expected


def test_aiohttp_reads_the_lines_of_a_stream_of_full_rows(url: str) -> None:
    """aiohttp refuses lines of more than 512 KiB. The prompt's rows on one line would be 5.5 MB."""
    body = {
        "messages": [{"role": "user", "content": "Hi"}],
        "stream": True,
        "max_tokens": 4,
        "return_logits": {"positions": "all"},
    }

    async def read() -> list[str]:
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{url}/v1/chat/completions", json=body) as response,
        ):
            assert response.status == 200
            return [line.decode().rstrip("\n") async for line in response.content]

    lines = asyncio.run(read())
    assert max(map(len, lines)) <= LONGEST_EVENT
    choices = [choice for chunk in chunks(lines) for choice in chunk["choices"]]
    prompt = [choice["logits"]["prompt"] for choice in choices if "prompt" in choice.get("logits", {})]
    ends = [block["offset"] + block["shape"][0] for block in prompt]
    assert [block["offset"] for block in prompt] == [0, *ends[:-1]]
    generated = [
        choice["logits"]["generated"] for choice in choices if "generated" in choice.get("logits", {})
    ]
    assert sum(block["shape"][0] for block in generated) == sum(
        len(choice.get("token_ids") or []) for choice in choices
    )
