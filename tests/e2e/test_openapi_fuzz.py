"""Schemathesis against a real server's own OpenAPI document: nothing undocumented, no 5xx, nothing wrong taken."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from byte_model import save_byte_model
from live_server import LiveServer, serving

KEY = "a-key-of-the-test"
CONFIG = """
[phases.fuzzing.generation]
max-examples = 150
[phases.stateful.generation]
max-examples = 60
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    directory = tmp_path_factory.mktemp("fuzz")
    model = save_byte_model(directory / "bytes", max_position_embeddings=256)
    with serving(
        directory / "server.log", "--model", str(model), "--dtype", "float32", "--api-key", KEY
    ) as server:
        yield server


def test_schemathesis_finds_nothing(server: LiveServer, tmp_path: Path) -> None:
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    found = subprocess.run(
        [
            sys.executable, "-m", "schemathesis.cli", "--config-file", "schemathesis.toml",
            "run", f"{server.url}/openapi.json", "--header", f"Authorization: Bearer {KEY}",
            "--phases", "examples,coverage,fuzzing,stateful",
            "--exclude-checks", "positive_data_acceptance",
            "--continue-on-failure", "--seed", "17", "--report", "ndjson", "--no-color",
        ],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=280,
        env={**os.environ, "PYTHONWARNINGS": ""},
    )  # fmt: skip
    assert found.returncode == 0, found.stdout[-20000:] + found.stderr[-2000:]
