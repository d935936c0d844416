"""A bound on the memory of a process that works for clients."""

from __future__ import annotations

import resource
from pathlib import Path


def limit_address_space(num_bytes: int) -> None:
    """Bound this process's address space to what it has and ``num_bytes`` more. Beyond it, no memory is to be had."""
    num_pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit, hard = num_pages * resource.getpagesize() + num_bytes, resource.getrlimit(resource.RLIMIT_AS)[1]
    if hard != resource.RLIM_INFINITY:  # a service's own bound, which cannot be raised
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
