"""Number of CPUs that this process may use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

OWN_CGROUP = Path("/proc/self/cgroup")
CGROUPS = Path("/sys/fs/cgroup")


def num_usable_cpus(own_cgroup: Path = OWN_CGROUP, cgroups: Path = CGROUPS) -> int:
    """Return how many threads can compute at once: the CPUs of the affinity mask, or fewer by a quota.

    Containers get their share of CPUs as a quota of a cgroup (version 2), which the mask does not show. A thread
    above the quota would hold up the others, so part of a CPU counts only where there is no whole one.

    See https://docs.kernel.org/admin-guide/cgroup-v2.html, cpu.max.
    """
    num_cpus = len(os.sched_getaffinity(0))
    return min([num_cpus, *(max(1, int(quota)) for quota in _quotas(own_cgroup, cgroups))])


def _quotas(own_cgroup: Path, cgroups: Path) -> Iterator[float]:
    """Yield the quotas, in CPUs, of the process's cgroup and those above it."""
    try:
        lines = own_cgroup.read_text().splitlines()
    except OSError:
        return
    for path in (line.removeprefix("0::") for line in lines if line.startswith("0::/")):
        # A container without a cgroup namespace reads the host's path, and sees its own cgroup at the root.
        for directory in (cgroups / path.lstrip("/"), *(cgroups / path.lstrip("/")).parents):
            if not directory.is_relative_to(cgroups):
                return
            try:
                quota, period = (directory / "cpu.max").read_text().split()
            except (OSError, ValueError):
                continue
            if quota != "max":
                yield int(quota) / int(period)
