"""Packages of npm against the real server: openai reads the API, apache-arrow the stream of rows."""

from __future__ import annotations

import pytest
from npm_programs import PROGRAMS, check_npm_package


@pytest.mark.parametrize("package", PROGRAMS)
def test_the_npm_package_gets_what_it_expects(server_url: str, package: str) -> None:
    check_npm_package(package, server_url)
