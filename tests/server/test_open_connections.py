"""The number of connections where few files may be open."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import logging, resource
from logitserve.http.http1.open_connections import affordable_connections
logging.basicConfig()
print(affordable_connections(1000), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


@pytest.mark.parametrize(
    ("limits", "expected", "says"),
    [
        ("ulimit -Sn 300", "1000 1128", ""),
        ("ulimit -Sn 300 && ulimit -Hn 700", "572 700", "572 connections are possible, not 1000"),
        ("ulimit -n 64", "32 64", "32 connections are possible, not 1000"),
    ],
    ids=["soft", "hard", "tiny"],
)
def test_the_limit_on_files_is_raised_as_far_as_it_may_be_and_no_further_count_is_promised(
    limits: str, expected: str, says: str
) -> None:
    done = subprocess.run(
        ["bash", "-c", f'{limits} && exec "$0" -c "$1"', sys.executable, PROGRAM],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == expected
    assert says in done.stderr
    assert bool(done.stderr) == bool(says)
