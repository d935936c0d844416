"""Schemathesis against a real server's own document: nothing undocumented, nothing wrong taken, no 5xx."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from byte_model import save_byte_model
from live_server import LiveServer, serving
from logitserve.http.openapi.operations import OPERATIONS
from safetensors.torch import save_file

pytestmark = pytest.mark.attacks

KEY = "a-key"
CONFIG = """
[phases.fuzzing.generation]
max-examples = 60

[phases.stateful.generation]
max-examples = 20
"""
FEWEST_CASES = 3000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    directory = tmp_path_factory.mktemp("fuzz")
    model = save_byte_model(directory / "bytes", max_position_embeddings=256)
    save_file({"weight": torch.ones(1, 64)}, directory / "helpful.safetensors")
    head = f"helpful={directory / 'helpful.safetensors'}"
    flags = ["--model", str(model), "--dtype", "float32", "--api-key", KEY, "--value-head", head]
    with serving(directory / "server.log", *flags) as server:
        yield server


@pytest.mark.timeout(900)
def test_schemathesis_finds_nothing_in_any_phase(server: LiveServer, tmp_path: Path) -> None:
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    command = ["-m", "schemathesis.cli", "--config-file", "schemathesis.toml", "run"]
    options = [
        "--header",
        f"Authorization: Bearer {KEY}",
        "--continue-on-failure",
        "--seed",
        "17",
        "--no-color",
    ]
    # Some bodies that fit the document mean nothing, and a 400 is right.
    options += ["--exclude-checks", "positive_data_acceptance"]
    found = subprocess.run(
        [sys.executable, *command, f"{server.url}/openapi.json", *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=800,
        env={**os.environ, "COLUMNS": "120"},
    )
    assert found.returncode == 0, found.stdout[-20_000:] + found.stderr[-2_000:]
    assert f"{len(OPERATIONS)} selected / {len(OPERATIONS)} total" in found.stdout
    passed = re.search(r"(\d+) generated, (\d+) passed", found.stdout)
    assert passed is not None
    assert int(passed[2]) >= FEWEST_CASES
