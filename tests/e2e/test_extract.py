"""`logitserve extract` against real servers: its rows, its stops, and the cost of a kill."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from arrow_reader import matrix, read_logits
from logitengine.config import EngineConfig
from logitserve.extract import run
from logitserve.extract.config import ExtractConfig
from logitserve.extract.errors import RefusedPromptError, UsageError
from safetensors.torch import load_file

SECONDS = 60
LINES: list[dict[str, Any]] = [
    {"prompt": "The first prompt of all", "id": "first"},
    {"prompt": [5, 100, 7, 30000, 12]},
    {"messages": [{"role": "user", "content": "Hi"}], "id": 12},
    {"prompt": [9]},
    {"prompt": list(range(3, 43))},
]
IDS = ["first", "1", "12", "3", "4"]
TOO_LONG = {"prompt": [5] * 600, "id": "long"}
ENGINE_FLAGS = ("--dtype", "float32", "--num-threads", "1", "--kv-cache-bytes", str(1 << 24))


def write_prompts(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_prompts(tmp_path / "prompts.jsonl", LINES)


def extract(prompts: Path, out: Path, url: str, **options: Any) -> None:
    config = ExtractConfig(url=url, **{"prompts_per_part": 2, **options})
    run.Extraction(prompts, out, config, EngineConfig()).run()


def command(prompts: Path, out: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "logitserve", "extract", str(prompts), str(out), *flags]


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert process.poll() is None, "the process ended early"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def left_beside(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.glob(f"{out.name}*") if path != out)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 3, "positions": "all", "max_tokens": 4, "temperature": 0.8, "seed": 5},
        {"token_ids": [9, 2, 40000], "logits_dtype": "bfloat16", "hidden_states": True},
        {
            "positions": "generated",
            "max_tokens": 2,
            "stage": "processed",
            "top_k": 2,
            "logits_dtype": "float32",
        },
    ],
    ids=["vocabulary", "top", "ids", "processed"],
)
def test_rows_are_those_of_the_endpoint_in_the_order_of_the_prompts(
    tiny_url: str, prompts: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    out = tmp_path / "out.parquet"
    extract(prompts, out, tiny_url, **options)
    assert left_beside(out) == []
    table = pq.read_table(out)
    asked = {"dtype": "float16", **options}
    asked["dtype"] = asked.pop("logits_dtype", asked["dtype"])
    seed = asked.pop("seed", 0)
    for index, line in enumerate(LINES):
        source = {"messages": line["messages"]} if "messages" in line else {"input": line["prompt"]}
        expected = read_logits(tiny_url, **source, **asked, seed=seed + index)
        mine = table.filter(pa.compute.equal(table["prompt_index"], index))
        assert set(mine["id"].to_pylist()) == {IDS[index]}
        for name in expected.schema.names:
            if name != "sequence":
                assert mine[name].to_pylist() == expected[name].to_pylist(), name
        for key, value in expected.schema.metadata.items():
            assert table.schema.metadata[key] == value
    order = list(zip(table["prompt_index"].to_pylist(), table["position"].to_pylist(), strict=True))
    assert order == sorted(order)


def test_a_killed_and_resumed_run_writes_the_same_file(tiny_url: str, tmp_path: Path) -> None:
    lines = [{"prompt": [5 + index] * 100} for index in range(24)]
    prompts = write_prompts(tmp_path / "prompts.jsonl", lines)
    options: dict[str, Any] = {"positions": "all", "max_tokens": 2, "concurrency": 1}
    extract(prompts, tmp_path / "whole.parquet", tiny_url, **options)

    out = tmp_path / "killed.parquet"
    parts = tmp_path / "killed.parquet.parts"
    flags = ["--url", tiny_url, "--prompts-per-part=2"]
    flags += [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    made: dict[Path, int] = {}
    for count in (1, 3):
        with subprocess.Popen(command(prompts, out, *flags)) as process:
            wait_until(lambda count=count: len(list(parts.glob("part-*.parquet"))) >= count, process)  # type: ignore[misc]
            process.kill()
        assert not out.exists()
        # Parts that were finished before the last kill are not computed again.
        assert all(path.stat().st_mtime_ns == stamp for path, stamp in made.items())
        made = {path: path.stat().st_mtime_ns for path in parts.glob("part-*.parquet")}
        assert count <= len(made) < 12
    # A kill in the middle of a write leaves files like these.
    (parts / "part-00011.parquet.tmp").write_bytes(b"PAR1")
    out.with_name("killed.parquet.tmp").write_bytes(b"PAR1")
    extract(prompts, out, tiny_url, **options)
    assert out.read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert pq.read_metadata(out).num_rows == 24 * 102
    assert left_beside(out) == []


def test_a_kill_after_the_last_step_is_cleaned_up(tiny_url: str, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    extract(prompts, out, tiny_url)
    content = out.read_bytes()
    with pytest.raises(UsageError, match="exists"):
        extract(prompts, out, tiny_url)
    (tmp_path / "out.parquet.parts").mkdir()
    extract(prompts, out, tiny_url)
    assert out.read_bytes() == content
    assert left_beside(out) == []


def test_a_refused_prompt_stops_the_run_or_is_recorded(tiny_url: str, tmp_path: Path) -> None:
    lines = [*LINES[:3], TOO_LONG, *LINES[3:]]
    prompts = write_prompts(tmp_path / "prompts.jsonl", lines)
    out = tmp_path / "out.parquet"
    with pytest.raises(RefusedPromptError, match=r"^line 4: .*600 tokens.*--skip-refused"):
        extract(prompts, out, tiny_url, prompts_per_part=1, concurrency=1)
    assert not out.exists()
    with pytest.raises(UsageError, match=r"options\.top_k was null and is 2"):
        extract(prompts, out, tiny_url, prompts_per_part=1, top_k=2)
    write_prompts(prompts, [*lines, {"prompt": [1]}])
    with pytest.raises(UsageError, match=r"input\.sha256 was"):
        extract(prompts, out, tiny_url, prompts_per_part=1)
    write_prompts(prompts, lines)
    extract(prompts, out, tiny_url, prompts_per_part=1, skip_refused=True)
    assert left_beside(out) == ["out.parquet.refused.jsonl"]
    (note,) = map(json.loads, (tmp_path / "out.parquet.refused.jsonl").read_text().splitlines())
    assert (note["line"], note["id"]) == (4, "long")
    assert "600 tokens" in note["message"]
    assert dict.fromkeys(pq.read_table(out)["prompt_index"].to_pylist()) == dict.fromkeys([0, 1, 2, 4, 5])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_safetensors_hold_the_same_numbers(tiny_url: str, prompts: Path, tmp_path: Path, dtype: str) -> None:
    options: dict[str, Any] = {"top_k": 3, "hidden_states": True, "logits_dtype": dtype}
    extract(prompts, tmp_path / "out.parquet", tiny_url, **options)
    extract(prompts, tmp_path / "out.safetensors", tiny_url, **options)
    table = pq.read_table(tmp_path / "out.parquet")
    tensors = load_file(tmp_path / "out.safetensors")
    assert tensors.keys() == set(table.schema.names) - {"id"}
    for name in ("prompt_index", "position", "token_id"):
        np.testing.assert_array_equal(tensors[name].numpy(), table[name].fill_null(-1).to_numpy())
    np.testing.assert_array_equal(tensors["logprob"].numpy(), table["logprob"].fill_null(np.nan).to_numpy())
    np.testing.assert_array_equal(tensors["top_ids"].numpy(), matrix(table, "top_ids"))
    assert tensors["prompt_index"].dtype == torch.int64
    for name in ("top_logits", "hidden_states"):
        assert tensors[name].dtype == getattr(torch, dtype)
        bits = tensors[name].view(torch.int16).numpy()
        np.testing.assert_array_equal(bits, matrix(table, name).view(np.int16))
    content = (tmp_path / "out.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for name, tensor in tensors.items():
        assert (8 + length + header[name]["data_offsets"][0]) % tensor.element_size() == 0
    metadata = header["__metadata__"]
    assert json.loads(metadata["ids"]) == IDS
    assert (metadata["dtype"], metadata["model"]) == (dtype, "tiny")


def test_the_server_that_extract_started_ends_with_a_killed_run(
    tiny_llama: Path, tiny_url: str, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.parquet"
    lines = [{"prompt": [5 + index] * 150} for index in range(12)]
    write_prompts(prompts, lines)
    flags = ("--model", str(tiny_llama), *ENGINE_FLAGS, "--concurrency=1", "--prompts-per-part=1")
    with subprocess.Popen(command(prompts, out, *flags)) as process:
        wait_until((tmp_path / "out.parquet.parts" / "part-00000.parquet").exists, process)
        family = psutil.Process(process.pid).children(recursive=True)
        assert not any(
            "LOGITSERVE" in word or len(word) == 43 for child in family for word in child.cmdline()
        )
        process.kill()
    assert psutil.wait_procs(family, timeout=SECONDS)[1] == []
    assert not out.exists()
    finished = subprocess.run(
        command(prompts, out, *flags), stderr=subprocess.PIPE, check=True, timeout=SECONDS
    )
    assert b"part written" in finished.stderr
    assert left_beside(out) == []
    extract(prompts, tmp_path / "reference.parquet", tiny_url)
    assert pq.read_table(out).equals(pq.read_table(tmp_path / "reference.parquet"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_stops_its_server(
    tiny_llama: Path, prompts: Path, tmp_path: Path, number: int, code: int
) -> None:
    out = tmp_path / "out.parquet"
    arguments = command(prompts, out, "--model", str(tiny_llama), *ENGINE_FLAGS)
    with subprocess.Popen(arguments, stderr=subprocess.PIPE) as process:
        wait_until(lambda: bool(psutil.Process(process.pid).children()), process)
        family = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, number)
        _, shown = process.communicate(timeout=SECONDS)
    assert process.returncode == code
    assert b"stopped" in shown
    assert not any(child.is_running() for child in family)
    assert left_beside(out) == []


def test_a_model_that_cannot_be_loaded_is_reported(tiny_llama: Path, prompts: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    (model / "config.json").write_text('{"model_type": "nonesuch"}')
    out = tmp_path / "out.parquet"
    arguments = command(prompts, out, "--model", str(model))
    ended = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=SECONDS)
    assert ended.returncode == 2
    told = ended.stderr.splitlines()[-1]
    assert told.startswith(f"logitserve extract: error: {model} could not be loaded: ")
    assert "nonesuch" in told
    assert left_beside(out) == []
