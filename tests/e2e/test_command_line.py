"""The command line for a user: errors come at once, in one line, and a ready server announces itself."""

from __future__ import annotations

import json
import os
import pty
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live_server import serving
from logitengine.model.checkpoint.files import gguf_path

SECONDS = 280
TINY = ("--dtype", "float32", "--num-threads", "1", "--kv-cache-bytes", "16MiB")


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which slow modules cannot be imported and no network is reached."""
    folder = tmp_path_factory.mktemp("blocked")
    for package in ("torch", "transformers"):
        (folder / f"{package}.py").write_text(f"raise SystemExit('{package} was imported')\n")
    others = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    path = os.pathsep.join([str(folder), *others])
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models that cannot be served. tests/engine/test_model_files.py has more."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "no-config").mkdir()
    (folder / "cut").mkdir()
    for name in ("config.json", "tokenizer.json"):
        (folder / "cut" / name).write_text("{}")
    (folder / "cut" / "model.safetensors").write_bytes(bytes(4))
    packaged = gguf_path("smollm2")
    assert packaged is not None
    (folder / "cut.gguf").write_bytes(
        packaged.read_bytes()[: 1 << 22]
    )  # the header, and a part of the weights
    return folder


def run(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "logitserve", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env, timeout=SECONDS)


def refusal(*arguments: str, env: dict[str, str]) -> str:
    """Return the one line with which a command is refused."""
    ended = run(*arguments, env=env)
    assert ended.returncode == 2, ended.stderr
    assert ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"logitserve {arguments[0]}: error: ")
    return line


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("/nope", "neither a directory, nor a .gguf file, nor a hub name"),
        ("no-such-owner/no-such-model", "could not be fetched from the hub"),
        ("{models}/no-config", "holds no config.json"),
        ("{models}/cut", "model.safetensors cannot be read"),
        ("{models}/cut.gguf", "is damaged: token_embd.weight takes"),
    ],
)
def test_a_model_that_cannot_be_served_is_refused_before_anything_slow_is_loaded(
    models: Path, without_torch: dict[str, str], model: str, says: str
) -> None:
    assert says in refusal("serve", model.format(models=models), "--port", "0", env=without_torch)


def test_the_same_holds_for_options_and_value_heads(without_torch: dict[str, str]) -> None:
    assert "--dtype" in refusal("serve", "--dtype", "float8", env=without_torch)
    assert "did you mean --port?" in refusal("serve", "--prot=80", env=without_torch)
    head = refusal("serve", "--value-head", "calm=/nope", "--port", "0", env=without_torch)
    assert "value head 'calm': there is no file /nope" in head


def test_a_taken_port_is_refused_at_once(without_torch: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"port {port} of 127.0.0.1 is taken" in refusal("serve", "--port", port, env=without_torch)


def test_extract_refuses_in_the_same_way(models: Path, tmp_path: Path, without_torch: dict[str, str]) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Hello"}\n')
    out = str(tmp_path / "out.parquet")
    for arguments, says in (
        ([str(prompts), out, "--model", str(models / "no-config")], "holds no config.json"),
        ([str(prompts), out, "--stagee", "raw"], "did you mean --stage?"),
        ([str(prompts), out, "--top-k", "none"], "--top-k"),
        (["/nope", out], "/nope cannot be read"),
    ):
        assert says in refusal("extract", *arguments, env=without_torch)
    assert list(tmp_path.iterdir()) == [prompts]


def test_help_and_version_load_nothing_slow(without_torch: dict[str, str]) -> None:
    for arguments in (["--version"], ["--help"], ["serve", "--help"], ["extract", "--help"]):
        ended = run(*arguments, env=without_torch)
        assert (ended.returncode, ended.stderr) == (0, "")


def test_a_model_that_fails_while_it_is_loaded_is_refused_in_the_same_way(
    tiny_llama: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    (model / "config.json").write_text('{"model_type": "nonesuch"}')
    line = refusal("serve", str(model), "--port", "0", "--log-level", "warning", env={**os.environ})
    assert f"{model} could not be loaded" in line
    assert "nonesuch" in line


def entries_of(log: Path) -> list[dict[str, Any]]:
    """Return the entries of a server's log. Every line is a JSON object, the engine's included."""
    return [json.loads(line) for line in log.read_text().splitlines()]


@pytest.fixture(scope="module")
def ready(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, Any]]]:
    """The log of a ready server, whose engine finds no compiler and warns of it."""
    folder = tmp_path_factory.mktemp("ready")
    patch = pytest.MonkeyPatch()
    patch.setenv("CXX", "no-such-compiler")
    log = folder / "server.log"
    with patch.context(), serving(log, str(tiny_llama), *TINY):
        patch.undo()
        yield entries_of(log)


def test_the_engine_logs_as_the_server_does(ready: list[dict[str, Any]]) -> None:
    assert all({"time", "level", "logger", "message"} <= entry.keys() for entry in ready)
    (warning,) = [entry for entry in ready if "native CPU kernels are not available" in entry["message"]]
    assert (warning["level"], warning["logger"]) == ("warning", "logitkernels.backend")
    (loaded,) = [entry for entry in ready if entry["message"].startswith("loaded ")]
    assert loaded["seconds"] > 0


def test_one_line_tells_what_is_served_and_how_to_ask(ready: list[dict[str, Any]]) -> None:
    (line,) = [entry for entry in ready if entry["message"] == "ready"]
    assert line["dtype"] == "float32"
    assert (line["device"], line["kernels"], line["weights"]) == ("cpu", "reference", "dense")
    assert line["max_model_len"] == 512
    block = line["block_size"] * 2 * 2 * 2 * 32 * 4  # layers, keys and values, heads, width, bytes of float32
    assert line["kv_cache_bytes"] == line["num_blocks"] * block <= 16 << 20
    (address,) = line["addresses"]
    command = shlex.split(line["try"])
    assert f"{address}/v1/chat/completions" in command
    answered = subprocess.run(
        [*command, "--silent", "--fail"], check=True, capture_output=True, timeout=SECONDS
    )
    assert json.loads(answered.stdout)["choices"][0]["message"]["role"] == "assistant"


def test_on_a_terminal_people_are_told_and_port_0_is_shown_as_the_port_that_it_became(
    tiny_llama: Path,
) -> None:
    terminal, end = pty.openpty()
    command = [sys.executable, "-m", "logitserve", "serve", str(tiny_llama), "--port", "0", *TINY]
    shown = b""
    with subprocess.Popen(command, stderr=end) as process:
        os.close(end)
        try:
            while b"curl" not in shown:
                shown += os.read(terminal, 1 << 16)
            process.send_signal(signal.SIGTERM)
            while piece := os.read(terminal, 1 << 16):
                shown += piece
        except OSError:  # Linux's way to say that the other end is closed
            pass
        finally:
            process.terminate()
        assert process.wait(timeout=SECONDS) == 0
    os.close(terminal)
    text = shown.decode()
    for words in ("model ", "float32", "kv cache", "blocks of 16 tokens", "512 tokens", "http://127.0.0.1:"):
        assert words in text
    assert ":0/" not in text
    assert '"level"' not in text
