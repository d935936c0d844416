"""The cpu image: built by docker/image.sh, and its server on a read-only root. Run by ``make image-test``.

A set IMAGE_STORAGE is the directory for images, with the base that an earlier run left there, and is kept.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from live_server import LiveServer, free_port

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "docker" / "image.sh"
SECONDS = 3000
START_SECONDS = 600
USER = 10001

pytestmark = [pytest.mark.images, pytest.mark.timeout(SECONDS)]

PROMPT = {
    "prompt": "The capital of France is",
    "max_tokens": 2,
    "temperature": 0,
    "return_logits": {"top_k": 3},
}
TOKEN_IDS = [[7042, 260, 4528], [30, 28, 284]]
VALUES = [[17.360611, 14.899603, 13.240951], [25.110619, 23.824451, 22.49065]]
"""What README shows for that prompt."""

SMALL_FILE = 1 << 20


@dataclass(frozen=True)
class Image:
    """The built image, and how long that took."""

    environment: dict[str, str]
    seconds: float

    def run(self, action: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [SCRIPT, action],
            capture_output=True,
            text=True,
            check=True,
            env={**self.environment, **variables},
        )


@dataclass
class Contents:
    """The root file system: names, bytes in all, and the files that hold one of some words."""

    names: set[str] = field(default_factory=set)
    nbytes: int = 0
    holding: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def image() -> Iterator[Image]:
    kept = os.environ.get("IMAGE_STORAGE")
    storage = kept or tempfile.mkdtemp(prefix="logitserve-images-", dir="/var/tmp")
    ours = {"IMAGE": "logitserve:test", "IMAGE_STORAGE": storage}
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("LOGITSERVE_")},
        **ours,
    }
    started = time.monotonic()
    try:
        subprocess.run([SCRIPT, "build", "cpu"], check=True, env=environment)
        yield Image(environment, time.monotonic() - started)
    finally:
        if kept is None:
            subprocess.run([SCRIPT, "remove"], check=False, env=environment)


@pytest.fixture(scope="module")
def config(image: Image) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(image.run("config").stdout)
    return parsed


def host_words() -> list[bytes]:
    """Return what this machine's pip configuration says, but for the public index and the certificates."""
    listed = subprocess.run(
        ["python3", "-m", "pip", "config", "list"], capture_output=True, text=True, check=True, cwd="/"
    )
    values = re.findall(r"[^\s'=]*/[^\s']+", listed.stdout)
    public = ("https://pypi.org", "/etc/ssl/")
    return [value.encode() for value in values if not value.startswith(public)]


@pytest.fixture(scope="module")
def contents(image: Image) -> Contents:
    found, words = Contents(), host_words()
    with subprocess.Popen([SCRIPT, "files"], stdout=subprocess.PIPE, env=image.environment) as archive:
        assert archive.stdout is not None
        with tarfile.open(fileobj=archive.stdout, mode="r|") as files:
            for member in files:
                found.names.add(member.name.removeprefix("./"))
                found.nbytes += member.size
                if member.isreg() and member.size < SMALL_FILE:
                    reader = files.extractfile(member)
                    assert reader is not None
                    text = reader.read()
                    if any(word in text for word in words):
                        found.holding.append(member.name)
    assert archive.returncode == 0
    return found


def test_the_configuration_says_how_the_server_is_started_checked_and_stopped(config: dict[str, Any]) -> None:
    assert config["User"] == f"{USER}:{USER}"
    assert (config["Entrypoint"], config["Cmd"]) == (["logitserve"], ["serve"])
    assert config["StopSignal"] == "SIGTERM"
    assert list(config["Volumes"]) == ["/cache"]
    assert "8000/tcp" in config["ExposedPorts"]
    variables = dict(variable.split("=", 1) for variable in config["Env"])
    assert variables["PYTHONSAFEPATH"] == "1"
    assert variables["LOGITSERVE_HOST"] == "0.0.0.0"  # noqa: S104  as containers must
    assert variables["XDG_CACHE_HOME"] == variables["HOME"] == "/cache"
    assert variables["HF_HOME"].startswith("/cache/")
    health = config["Healthcheck"]
    assert health["Test"][0] == "CMD"
    assert "/ready" in health["Test"][-1]
    assert health["StartPeriod"] >= 60 * 10**9


def test_the_image_holds_what_serves_and_nothing_of_the_machine_that_built_it(
    image: Image, contents: Contents
) -> None:
    print(f"\nbuilt in {image.seconds:.0f} s; {contents.nbytes / 1e6:.0f} MB of files")  # noqa: T201  to be read
    assert not contents.holding
    assert not {name for name in contents.names if name.endswith(("pip.conf", "bin/gcc", "bin/g++"))}
    assert "opt/venv/bin/logitserve" in contents.names
    assert "opt/venv/bin/pip" not in contents.names
    assert not {
        name for name in contents.names if name.startswith(("src/", "root/.cache", "var/lib/apt/lists/d"))
    }
    assert any(name.endswith(".gguf") for name in contents.names)


@dataclass(frozen=True)
class ImageServer(LiveServer):
    """The image's server, and the directory that is its cache."""

    cache: Path

    @property
    def port(self) -> int:
        port = httpx.URL(self.url).port
        assert port is not None
        return port

    def messages(self) -> list[str]:
        lines = self.log.read_text().splitlines()
        return [json.loads(line)["message"] for line in lines if line.startswith("{")]


@pytest.fixture
def server(image: Image, tmp_path: Path) -> Iterator[ImageServer]:
    cache, log, port = tmp_path / "cache", tmp_path / "log", free_port()
    cache.mkdir()
    for folder in (tmp_path, *list(tmp_path.parents)[:2]):  # pytest's own are closed to other users
        folder.chmod(0o755)
    variables = {
        "CACHE": str(cache),
        "LOGITSERVE_PORT": str(port),
        "LOGITSERVE_KV_CACHE_BYTES": "256MiB",
        "LOGITSERVE_DRAIN_TIMEOUT": str(START_SECONDS),
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            [SCRIPT, "run"], stdout=output, stderr=output, env={**image.environment, **variables}
        )
    served = ImageServer(f"http://127.0.0.1:{port}", process, log, cache)
    try:
        served.wait_ready(START_SECONDS)
        yield served
    finally:
        process.terminate()
        try:
            process.wait(60)
        finally:
            process.kill()
            shutil.rmtree(cache, ignore_errors=True)


def process_of(port: int) -> psutil.Process:
    """Return the process that listens, in whatever container."""
    (pid,) = {
        connection.pid
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr[1:2] == (port,)
    }
    return psutil.Process(pid)


def stream_of(client: http.client.HTTPConnection, tokens: int) -> http.client.HTTPResponse:
    body = {
        "prompt": "Once",
        "max_tokens": tokens,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    client.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    response = client.getresponse()
    assert response.status == 200
    return response


def test_the_server_answers_as_the_readme_says_on_a_read_only_root_and_drains(
    image: Image, server: ImageServer
) -> None:
    process = process_of(server.port)
    assert set(process.uids()) == set(process.gids()) == {USER}
    root = Path(f"/proc/{process.pid}/root")
    assert os.statvfs(root / "opt").f_flag & os.ST_RDONLY
    assert not os.statvfs(root / "cache").f_flag & os.ST_RDONLY

    (choice,) = httpx.post(f"{server.url}/v1/completions", json=PROMPT, timeout=120).json()["choices"]
    assert choice["text"] == " Paris."
    rows = choice["logits"]["generated"]
    assert (rows["token_ids"], rows["values"]) == (TOKEN_IDS, VALUES)

    messages = server.messages()
    assert any(message.startswith("native kernels compiled ahead for ") for message in messages), messages
    assert not any(message.startswith(("compiling", "converting")) for message in messages), messages
    # What is kept there is no more than the digests of the weights' files, for the fingerprint.
    assert {path.name for path in (server.cache / "logitserve").glob("*")} <= {"digests"}

    image.run("healthcheck", CACHE=str(server.cache), LOGITSERVE_PORT=str(server.port))

    client = http.client.HTTPConnection("127.0.0.1", server.port, timeout=300)
    stream = stream_of(client, tokens=100)
    first = stream.readline()
    server.process.send_signal(signal.SIGTERM)
    rest = stream.read()
    client.close()
    assert server.process.wait(START_SECONDS) == 0
    assert (first + rest).rstrip().endswith(b"data: [DONE]")
    assert b'"finish_reason":"length"' in rest
    assert "draining" in server.messages()


def test_a_health_check_without_a_server_fails(image: Image, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    checked = subprocess.run(
        [SCRIPT, "healthcheck"],
        check=False,
        env={**image.environment, "CACHE": str(cache), "LOGITSERVE_PORT": str(free_port())},
    )
    assert checked.returncode != 0
