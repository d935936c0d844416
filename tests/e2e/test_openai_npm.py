"""The openai npm package drives the real server."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent / "npm"


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
@pytest.mark.skipif(
    not (PACKAGE / "node_modules" / "openai").is_dir(), reason="needs `make test`, or npm install"
)
def test_the_npm_package_gets_what_it_expects(server_url: str) -> None:
    result = subprocess.run(
        ["node", "check.mjs", server_url],
        cwd=PACKAGE,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "every promise held" in result.stdout
