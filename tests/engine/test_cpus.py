"""The default number of threads follows the quota of the process's cgroup."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from logitengine.model.cpus import num_usable_cpus

MANY = 64


@pytest.fixture(autouse=True)
def _machine_with_many_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(MANY)))


@pytest.mark.parametrize(
    ("quotas", "expected"),
    [
        ({}, MANY),
        ({"": "max 100000"}, MANY),
        ({"pod/server": "200000 100000"}, 2),
        ({"pod/server": "250000 100000"}, 2),
        ({"pod/server": "50000 100000"}, 1),
        ({"pod/server": "max 100000", "pod": "400000 100000"}, 4),
        ({"pod/server": "800000 100000", "pod": "400000 100000"}, 4),
        ({"": "300000 100000"}, 3),
        ({"other": "100000 100000"}, MANY),
        ({"pod/server": "12800000 100000"}, MANY),
    ],
)
def test_the_smallest_quota_above_the_process_counts(
    tmp_path: Path, quotas: dict[str, str], expected: int
) -> None:
    (tmp_path / "self").write_text("0::/pod/server\n")
    for name, quota in quotas.items():
        directory = tmp_path / "cgroups" / name
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "cpu.max").write_text(f"{quota}\n")
    assert num_usable_cpus(tmp_path / "self", tmp_path / "cgroups") == expected


@pytest.mark.parametrize("text", ["", "12:cpu,cpuacct:/docker/a\n1:name=systemd:/docker/a\n"])
def test_without_a_quota_to_be_read_all_cpus_count(tmp_path: Path, text: str) -> None:
    (tmp_path / "self").write_text(text)
    assert num_usable_cpus(tmp_path / "self", tmp_path / "cgroups") == MANY
    assert num_usable_cpus(tmp_path / "missing", tmp_path / "cgroups") == MANY


def test_this_machine_has_a_cpu() -> None:
    assert num_usable_cpus() >= 1
