"""Programs of tests/real_clients, which run in environments of their own and print what a client found."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest

FOLDER = Path(__file__).parent.parent / "real_clients"
NPM = Path(__file__).parent.parent / "e2e" / "npm"
SECONDS = 240

OFFLINE = {
    "DO_NOT_TRACK": "1",
    "HAYSTACK_TELEMETRY_ENABLED": "False",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_OFFLINE": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
}
"""Variables that keep clients from asking the network for anything but the server's answers."""


def run_python(
    program: str, *arguments: str | Path, environment: str | None, work: Path, cwd: Path = FOLDER
) -> Any:
    """Run a program of tests/real_clients/programs and return the JSON of its last line.

    ``environment`` names one of tests/real_clients/environments; None is that of the tests. ``work`` is a folder
    for what the client keeps.
    """
    python = (
        Path(sys.executable)
        if environment is None
        else FOLDER / "environments" / environment / "bin" / "python"
    )
    if not python.is_file():
        pytest.skip("needs `make test-clients`")
    return _run([python, FOLDER / "programs" / program, *arguments], work, cwd)


def run_node(program: str, *arguments: str, package: str, work: Path) -> Any:
    """Run a program of tests/e2e/npm, which uses ``package``, and return the JSON of its last line."""
    if shutil.which("node") is None or not (NPM / "node_modules" / package).is_dir():
        pytest.skip("needs node and `make test-clients`")
    return _run(["node", program, *arguments], work, NPM)


def _run(command: list[str | Path], work: Path, cwd: Path) -> Any:
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        command,
        cwd=cwd,
        env={**variables, **OFFLINE, "HF_HOME": str(work)},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return orjson.loads(result.stdout.splitlines()[-1])
