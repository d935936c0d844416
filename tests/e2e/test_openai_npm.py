"""Packages of npm against the real server: openai reads the API, apache-arrow the stream of rows."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent / "npm"


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
@pytest.mark.parametrize(("package", "program"), [("openai", "check.mjs"), ("apache-arrow", "arrow.mjs")])
def test_the_npm_package_gets_what_it_expects(server_url: str, package: str, program: str) -> None:
    if not (PACKAGE / "node_modules" / package).is_dir():
        pytest.skip("needs `make test`, or npm install")
    result = subprocess.run(
        ["node", program, server_url],
        cwd=PACKAGE,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "every promise held" in result.stdout
