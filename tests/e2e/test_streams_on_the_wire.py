"""Streams read in other ways: line by line, with a bound on lines, through silences with pings."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import numpy as np
import openai
import pytest
from arrow_reader import read_logits
from live_server import serving
from logitclient import Client
from npm_programs import PROGRAMS, check_npm_package
from numpy.typing import NDArray

LONGEST_EVENT = 400_000
MESSAGES: list[Any] = [{"role": "user", "content": "Hi"}]
CASE_8 = {"prompt": "a\u2028b", "echo": True, "max_tokens": 1, "stream": True}
CASE_9 = {"messages": MESSAGES, "stream": True, "max_tokens": 4, "return_logits": {"positions": "all"}}


@pytest.fixture(scope="module")
def pinging_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that fills every silence with pings, and has a place for one request."""
    log = tmp_path_factory.mktemp("pinging") / "server.log"
    with serving(log, "--ping-interval=0.001", "--max-num-seqs=1") as server:
        yield server.url


def blocks(events: list[dict[str, Any]], part: str) -> NDArray[np.float32]:
    found: list[NDArray[np.float32]] = []
    for event in events:
        (choice,) = event["choices"]
        block = choice.get("logits", {}).get(part)
        if block is None:
            continue
        if part == "generated":
            assert block["shape"][0] == len(choice["token_ids"])
        else:
            assert block["offset"] == sum(map(len, found))
        found.append(np.frombuffer(base64.b64decode(block["data"]), np.float32).reshape(block["shape"]))
    return np.concatenate(found)


def test_a_line_separator_in_a_text_does_not_break_a_line_for_httpx(server_url: str) -> None:
    with httpx.stream("POST", f"{server_url}/v1/completions", json=CASE_8, timeout=60) as response:
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    text = "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines[:-1])
    assert text.startswith("a\u2028b")


@pytest.mark.anyio
async def test_all_rows_of_a_chat_are_read_by_a_client_with_a_bound_on_lines(server_url: str) -> None:
    """aiohttp's reader raises ValueError for a line of more than 512 KiB."""
    asked = {**CASE_9, "temperature": 0, "ignore_eos": True}
    url = f"{server_url}/v1/chat/completions"
    async with aiohttp.ClientSession() as session:
        async with session.post(url, json=asked) as response:
            lines = [line async for line in response.content]
        async with session.post(url, json={**asked, "stream": False}) as response:
            whole = await response.json()
    assert max(map(len, lines)) <= LONGEST_EVENT
    events = [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
    for part in ("prompt", "generated"):
        assert np.array_equal(blocks(events, part), blocks([whole], part))
    assert len(blocks(events, "generated")) == 4


def test_logitclient_reads_split_rows_as_it_reads_whole_ones(server_url: str) -> None:
    asked: dict[str, Any] = {"max_tokens": 3, "temperature": 0, "ignore_eos": True}
    asked |= {"return_logits": {"positions": "all"}, "prompt_logprobs": 2}
    with Client(server_url, max_retries=0) as client:
        whole = client.chat(MESSAGES, **asked)
        with client.stream_chat(MESSAGES, **asked) as stream:
            chunks = list(stream)
    assert whole.logits is not None
    for part in ("generated", "prompt"):
        found = [getattr(chunk.logits, part) for chunk in chunks if chunk.logits is not None]
        rows = [block for block in found if block is not None]
        assert len(rows) > 2
        if part == "prompt":
            starts = np.cumsum([0] + [len(block) for block in rows])
            assert [block.offset for block in rows] == starts[:-1].tolist()
        assert np.array_equal(
            np.concatenate([block.values for block in rows]), getattr(whole.logits, part).values
        )
    assert sum((chunk.prompt_logprobs or () for chunk in chunks), ()) == whole.prompt_logprobs


def test_the_openai_package_reads_past_pings(pinging_url: str) -> None:
    asked: dict[str, Any] = {"model": "smollm2", "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
    with openai.OpenAI(base_url=f"{pinging_url}/v1", api_key="none", max_retries=0) as client:
        whole = client.chat.completions.create(**asked)
        with client.chat.completions.with_streaming_response.create(**asked, stream=True) as raw:
            assert b": ping\n\n" in raw.read()
        chunks = list(client.chat.completions.create(**asked, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content


def test_logitclient_and_pyarrow_read_past_silences(pinging_url: str) -> None:
    asked: dict[str, Any] = {"max_tokens": 12, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    with Client(pinging_url, max_retries=0) as client:
        whole = client.complete([5, 6, 7], **asked)
        with client.stream_complete([5, 6, 7], **asked) as stream:
            text = "".join(chunk.text for chunk in stream)
        assert text == whole.text
    table = read_logits(pinging_url, input=[5, 6, 7, 8], top_k=2)
    assert table.num_rows == 4


@pytest.mark.parametrize("package", PROGRAMS)
def test_the_npm_packages_read_past_silences(pinging_url: str, package: str) -> None:
    check_npm_package(package, pinging_url)


def test_a_request_behind_a_long_one_gets_its_head_and_pings_at_once(pinging_url: str) -> None:
    """The second stream waits for the only place, which the first one holds.

    Its reader gets the head and pings.
    """
    asked = {"prompt": [5, 6], "max_tokens": 2000, "ignore_eos": True, "stream": True}
    url = f"{pinging_url}/v1/completions"
    with (
        httpx.stream("POST", url, json=asked, timeout=60) as first,
        httpx.stream("POST", url, json={**asked, "max_tokens": 1}, timeout=60) as second,
    ):
        assert second.status_code == 200
        pieces = second.iter_bytes()
        assert next(pieces).startswith(b": ping\n\n")
        first.close()
        assert b"".join(pieces).endswith(b"data: [DONE]\n\n")


def test_a_request_that_waits_or_takes_too_long_leaves_the_engine_free(
    tiny_llama: Path, tmp_path: Path
) -> None:
    options = ("--dtype=float32", "--num-threads=1", "--max-num-seqs=1", "--served-model-name=tiny")
    limits = ("--queue-timeout=0.2", "--request-timeout=1")
    long: dict[str, Any] = {"prompt": [5, 6], "max_tokens": 500, "ignore_eos": True, "n": 32}
    short = {"prompt": [7, 8], "max_tokens": 1}
    with serving(tmp_path / "server.log", str(tiny_llama), *options, *limits) as server:
        url = f"{server.url}/v1/completions"
        with httpx.stream("POST", url, json={**long, "stream": True}, timeout=60) as running:
            lines = running.iter_lines()
            assert next(lines).startswith("data: ")
            late = httpx.post(url, json=short, timeout=60)
            assert (late.status_code, late.json()["error"]["code"]) == (503, "queue_timeout")
            assert int(late.headers["retry-after"]) >= 1
            *_, last = [line for line in lines if line]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "request_timeout"
        assert httpx.post(url, json=short, timeout=60).status_code == 200
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=3) as client:
            body = {name: long[name] for name in ("prompt", "max_tokens", "n")}
            with pytest.raises(openai.InternalServerError) as caught:
                client.completions.create(model="tiny", **body, extra_body={"ignore_eos": True})
        assert caught.value.status_code == 504
        assert httpx.post(url, json=short, timeout=60).status_code == 200
    # A request's line is written after its answer, so the log is complete once the server has ended.
    assert server.log.read_text().count('"status":504') == 1, "the package does not try again"
