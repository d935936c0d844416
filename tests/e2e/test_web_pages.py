"""Requests of web pages, over sockets: a keyless server is out of reach, one with keys can be opened."""

from __future__ import annotations

import http.client
import json
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from live_server import LiveServer, serving

pytestmark = pytest.mark.anyio

COMPLETIONS = "/v1/completions"
BODY = {"prompt": "Hi", "max_tokens": 1}
CONTENT = json.dumps(BODY).encode()
EVIL = "https://evil.example"
APP = "https://app.example"
ROOT = "/small"
OPTIONS = ("--dtype", "float32", "--num-threads", "1")

Headers = list[tuple[str, str]]


@pytest.fixture(scope="module")
def keyless(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server as most people start it: on loopback, with no key."""
    with serving(
        tmp_path_factory.mktemp("keyless") / "server.log",
        str(tiny_llama),
        *OPTIONS,
        "--allowed-host",
        "a.lan",
    ) as server:
        yield server


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text("# two tenants\nkey-one\nkey-two\n")
    return path


@pytest.fixture(scope="module")
def guarded(tiny_llama: Path, keys: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server behind a proxy of this machine, with a key for each of two tenants, and open to one web app."""
    flags = ["--api-key-file", str(keys), "--cors-origin", APP, "--root-path", ROOT]
    flags += ["--forwarded-allow-ips", "127.0.0.1"]
    log = tmp_path_factory.mktemp("guarded") / "server.log"
    with serving(log, str(tiny_llama), *OPTIONS, *flags) as server:
        yield server


def send(
    server: LiveServer, method: str, path: str, headers: Headers, body: bytes = b""
) -> tuple[int, dict[str, str], Any]:
    """Send exactly these headers and the body's length. Returns status, headers and JSON."""
    address = urlsplit(server.url).netloc
    connection = http.client.HTTPConnection(address, timeout=60)
    try:
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in [*headers, *([("Content-Length", str(len(body)))] if body else [])]:
            connection.putheader(name, value.replace("SELF", address))
        connection.endheaders(body)
        response = connection.getresponse()
        content = response.read()
        told = {name.lower(): value for name, value in response.getheaders()}
        return response.status, told, json.loads(content) if content else None
    finally:
        connection.close()


def page(origin: str | None, host: str = "SELF", content_type: str | None = "application/json") -> Headers:
    """Headers of a browser: the page's origin, the host as the page knows it, and the content type."""
    headers = [("Host", host), ("User-Agent", "Mozilla/5.0")]
    headers += [("Origin", origin)] if origin is not None else []
    return headers + ([("Content-Type", content_type)] if content_type is not None else [])


FORM = "application/x-www-form-urlencoded"
MULTIPART = "multipart/form-data; boundary=x"
PREFLIGHT = [("Access-Control-Request-Method", "POST"), ("Access-Control-Request-Headers", "content-type")]


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        pytest.param("POST", COMPLETIONS, page(EVIL, content_type="text/plain"), 403, id="simple fetch"),
        pytest.param("POST", COMPLETIONS, page(EVIL, content_type=FORM), 403, id="form"),
        pytest.param("POST", COMPLETIONS, page(EVIL, content_type=MULTIPART), 403, id="multipart form"),
        pytest.param("POST", COMPLETIONS, page(EVIL, content_type=None), 403, id="blob without a type"),
        pytest.param("POST", COMPLETIONS, page("null", content_type="text/plain"), 403, id="sandboxed"),
        pytest.param(
            "POST", COMPLETIONS, page("null", content_type=FORM), 403, id="form that hides its origin"
        ),
        pytest.param(
            "POST", COMPLETIONS, page("http://127.0.0.1:1", content_type=FORM), 403, id="page of another port"
        ),
        pytest.param(
            "OPTIONS", COMPLETIONS, [*page(EVIL, content_type=None), *PREFLIGHT], 403, id="preflight"
        ),
        pytest.param(
            "POST",
            COMPLETIONS,
            page(EVIL, "evil.example", "text/plain"),
            403,
            id="rebound name, text (case 5)",
        ),
        pytest.param("POST", COMPLETIONS, page(EVIL, "evil.example"), 403, id="rebound name, JSON"),
        pytest.param("GET", "/v1/models", page(None, "evil.example", None), 421, id="rebound name, read"),
        pytest.param(
            "GET", "/v1/models", page(None, "evil.example:80", None), 421, id="rebound name and port"
        ),
        pytest.param(
            "GET",
            "/v1/models",
            [*page(EVIL, content_type=None), ("Connection", "Upgrade"), ("Upgrade", "websocket")],
            403,
            id="websocket",
        ),
        pytest.param(
            "POST", COMPLETIONS, page("http://SELF", content_type="text/plain"), 415, id="own page, text"
        ),
        pytest.param("POST", COMPLETIONS, page("http://SELF", content_type=FORM), 415, id="own page, form"),
        pytest.param("POST", COMPLETIONS, page(None, content_type="text/plain"), 415, id="text of no page"),
        pytest.param("POST", COMPLETIONS, page(None, content_type=MULTIPART), 415, id="multipart of no page"),
        pytest.param("POST", COMPLETIONS, [*page("http://SELF"), ("Origin", EVIL)], 400, id="two origins"),
        pytest.param("POST", COMPLETIONS, [*page(None), ("Host", "evil.example")], 400, id="two hosts"),
        pytest.param("POST", COMPLETIONS, [("Content-Type", "application/json")], 400, id="no host"),
    ],
)
def test_a_page_that_is_not_ours_drives_nothing(
    keyless: LiveServer, method: str, path: str, headers: Headers, status: int
) -> None:
    named = [*headers, ("X-Request-Id", "from-a-page")]
    got, told, body = send(keyless, method, path, named, CONTENT if method == "POST" else b"")
    assert got == status, body
    assert body["error"]["message"]
    assert told["x-request-id"] == "from-a-page"
    assert status != 403 or "access-control-allow-origin" not in told


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param(page("http://SELF"), id="own page"),
        pytest.param(page("https://SELF"), id="own page behind TLS"),
        pytest.param(page("http://a.lan", "a.lan"), id="own page by an allowed name"),
        pytest.param(page(None), id="no page"),
        pytest.param(page(None, "localhost"), id="localhost"),
        pytest.param(page(None, "a.lan:8000"), id="allowed name"),
        pytest.param(page(None, content_type=FORM), id="curl's form type"),
        pytest.param(page(None, content_type=None), id="no type"),
    ],
)
def test_what_is_ours_is_answered(keyless: LiveServer, headers: Headers) -> None:
    status, _, body = send(keyless, "POST", COMPLETIONS, headers, CONTENT)
    assert status == 200, body
    assert body["usage"]["completion_tokens"] == 1


def test_probes_answer_under_any_name(keyless: LiveServer) -> None:
    for path in ("/health", "/ready"):
        assert send(keyless, "GET", path, [("Host", "evil.example")])[0] == 200


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl_needs_no_header_for_json(keyless: LiveServer) -> None:
    command = ["curl", "--silent", "--fail-with-body", keyless.url + COMPLETIONS, "--data", CONTENT.decode()]
    answer = subprocess.run(command, capture_output=True, check=True, timeout=60)
    assert json.loads(answer.stdout)["object"] == "text_completion"


def test_a_preflight_needs_no_key_and_the_stream_that_follows_may_be_read(guarded: LiveServer) -> None:
    """Preflight and stream as the browser of a web app sends them."""
    asked = [("Access-Control-Request-Method", "POST"), ("Access-Control-Request-Headers", "authorization")]
    status, told, _ = send(guarded, "OPTIONS", COMPLETIONS, [*page(APP, content_type=None), *asked])
    assert (status, told["access-control-allow-origin"]) == (204, APP)
    assert told["access-control-allow-headers"] == "authorization"
    with httpx.Client(base_url=guarded.url, headers={"origin": APP}, timeout=60) as client:
        refused = client.post(COMPLETIONS, json=BODY)
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, APP)
        key = {"authorization": "Bearer key-one"}
        with client.stream("POST", COMPLETIONS, json={**BODY, "stream": True}, headers=key) as stream:
            assert stream.status_code == 200
            assert stream.headers["access-control-allow-origin"] == APP
            assert "x-request-id" in stream.headers["access-control-expose-headers"]
            assert [line for line in stream.iter_lines() if line][-1] == "data: [DONE]"
        assert client.post(COMPLETIONS, json=BODY, headers={"origin": EVIL, **key}).status_code == 403


def test_no_tenant_can_probe_anothers_prompts(guarded: LiveServer) -> None:
    def cached_tokens(key: str, salt: str | None = None) -> int:
        body = {"prompt": list(range(100, 180)), "max_tokens": 1, "cache_salt": salt}
        answer = httpx.post(guarded.url + COMPLETIONS, json=body, headers={"x-api-key": key}, timeout=60)
        cached: int = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        return cached

    assert cached_tokens("key-one") == 0
    assert cached_tokens("key-one") > 0
    assert cached_tokens("key-two") == 0
    assert cached_tokens("key-two") > 0
    assert cached_tokens("key-one", "s") == 0
    assert cached_tokens("key-one", "s") > 0
    assert cached_tokens("key-two", "s") == 0


@pytest.mark.parametrize("prefix", [ROOT, ""], ids=["prefix left", "prefix taken off"])
def test_a_proxy_may_leave_the_prefix_or_take_it_off(guarded: LiveServer, prefix: str) -> None:
    with httpx.Client(base_url=guarded.url, timeout=60) as client:
        for probe in ("/health", "/ready"):
            assert client.get(prefix + probe).status_code == 200
        for path in (
            "/v1/models",
            "/openapi.json",
            "//health",
            "/health/",
            "/%2Fhealth",
            f"{ROOT}{ROOT}/health",
        ):
            assert client.get(prefix + path).status_code == 401
        models = client.get(f"{prefix}/v1/models", headers={"x-api-key": "key-one"})
        assert models.json()["object"] == "list"


async def test_the_log_has_the_address_that_a_trusted_proxy_gives(
    guarded: LiveServer, keyless: LiveServer
) -> None:
    for server, told in ((guarded, "203.0.113.9"), (keyless, "127.0.0.1")):
        headers = {"x-request-id": "through-a-proxy", "x-forwarded-for": "6.6.6.6, 203.0.113.9"}
        async with httpx.AsyncClient(base_url=server.url) as client:
            await client.get("/version", headers=headers)
        assert (await server.logged("through-a-proxy"))["client"] == told


def test_sighup_reads_the_keys_again(guarded: LiveServer, keys: Path) -> None:
    """The test's time limit ends the waiting."""
    with httpx.Client(base_url=guarded.url) as client:

        def wait_for(key: str, status: int) -> None:
            while client.get("/version", headers={"x-api-key": key}).status_code != status:
                pass

        before = keys.read_text()
        wait_for("key-one", 200)
        wait_for("key-three", 401)
        keys.write_text("key-three\n")
        guarded.process.send_signal(signal.SIGHUP)
        wait_for("key-three", 200)
        wait_for("key-one", 401)
        keys.write_text("not a key\n")
        guarded.process.send_signal(signal.SIGHUP)
        while "the API keys stay as they were" not in guarded.tail():
            wait_for("key-three", 200)
        keys.write_text(before)
        guarded.process.send_signal(signal.SIGHUP)
        wait_for("key-one", 200)
    assert "key-one" not in guarded.log.read_text()
    assert "key-three" not in guarded.log.read_text()


def test_sighup_keeps_its_default_without_a_file(guarded: LiveServer, keyless: LiveServer) -> None:
    assert catches_sighup(guarded)
    assert not catches_sighup(keyless)


def catches_sighup(server: LiveServer) -> bool:
    """Return whether the process has a handler for SIGHUP or ignores it: its bits in /proc."""
    lines = Path(f"/proc/{server.process.pid}/status").read_text().splitlines()
    masks = {
        name: int(mask, 16)
        for name, _, mask in (line.partition(":") for line in lines)
        if name[:3] == "Sig" and "/" not in mask
    }
    return bool((masks["SigCgt"] | masks["SigIgn"]) & 1 << signal.SIGHUP - 1)
