"""One request by each of several real clients, with the answer in one form."""

from __future__ import annotations

import asyncio
import base64
import gc
import json
import shutil
import subprocess
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest

SECONDS = 60
FETCH = Path(__file__).parent.parent / "e2e" / "npm" / "fetch.mjs"


@dataclass(frozen=True)
class Sent:
    """A request as its user writes it."""

    method: str
    url: str
    headers: Mapping[str, str]
    body: bytes | None = None


@dataclass(frozen=True)
class Answered:
    """The answer to a request. Names of headers are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def by_httpx(sent: Sent) -> Answered:
    with httpx.Client(timeout=SECONDS) as client:
        answer = client.request(sent.method, sent.url, headers=dict(sent.headers), content=sent.body)
    return Answered(answer.status_code, dict(answer.headers), answer.content)


def by_aiohttp(sent: Sent) -> Answered:
    async def send() -> Answered:
        timeout = aiohttp.ClientTimeout(SECONDS)
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.request(sent.method, sent.url, headers=dict(sent.headers), data=sent.body) as answer,
        ):
            headers = {name.lower(): value for name, value in answer.headers.items()}
            return Answered(answer.status, headers, await answer.read())

    answered = asyncio.run(send())
    with warnings.catch_warnings():
        # aiohttp leaves the transport of a body that was refused half-way to the garbage collector.
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()
    return answered


def by_urllib(sent: Sent) -> Answered:
    request = urllib.request.Request(  # noqa: S310 - the address of the tests' own server
        sent.url, data=sent.body, headers=dict(sent.headers), method=sent.method
    )
    try:
        answer = urllib.request.urlopen(request, timeout=SECONDS)  # noqa: S310
    except urllib.error.HTTPError as error:
        answer = error
    with answer:
        headers = {name.lower(): value for name, value in answer.headers.items()}
        return Answered(answer.status, headers, answer.read())


def by_curl(sent: Sent, *options: str) -> Answered:
    """Send by curl with further ``options``, such as --http2."""
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    headers = [flag for name, value in sent.headers.items() for flag in ("-H", f"{name}: {value}")]
    body = [] if sent.body is None else ["--data-binary", "@-"]
    method = ["--head"] if sent.method == "HEAD" else ["-X", sent.method]
    result = subprocess.run(
        ["curl", "-sS", "-i", "--max-time", str(SECONDS), *options, *method, *headers, *body, sent.url],
        input=sent.body or b"",
        capture_output=True,
        check=True,
    )
    head, _, content = result.stdout.partition(b"\r\n\r\n")
    while head.startswith(b"HTTP/1.1 100"):
        head, _, content = content.partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    pairs = (line.split(": ", 1) for line in lines)
    return Answered(int(status.split()[1]), {name.lower(): value for name, value in pairs}, content)


def by_node(sent: Sent) -> Answered:
    """Send by Node's fetch."""
    if shutil.which("node") is None:
        pytest.skip("needs node")
    body = None if sent.body is None else base64.b64encode(sent.body).decode()
    request = {"method": sent.method, "url": sent.url, "headers": dict(sent.headers), "body": body}
    result = subprocess.run(
        ["node", str(FETCH)],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    return Answered(answer["status"], dict(answer["headers"]), base64.b64decode(answer["body"]))


Send = Callable[[Sent], Answered]

CLIENTS: dict[str, Send] = {
    "httpx": by_httpx,
    "aiohttp": by_aiohttp,
    "urllib": by_urllib,
    "curl": by_curl,
    "node": by_node,
}
