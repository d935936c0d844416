"""Programs of tests/e2e/npm, which check a package of npm against a server."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "e2e" / "npm"
PROGRAMS = {"openai": "check.mjs", "apache-arrow": "arrow.mjs"}
"""Packages, and the program that uses each."""


def check_npm_package(package: str, url: str) -> None:
    """Run the package's program against the server at ``url``. Skips the test where Node or the package is missing."""
    if shutil.which("node") is None:
        pytest.skip("needs node")
    if not (FOLDER / "node_modules" / package).is_dir():
        pytest.skip("needs `make test`, or npm install")
    result = subprocess.run(
        ["node", PROGRAMS[package], url], cwd=FOLDER, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "every promise held" in result.stdout
