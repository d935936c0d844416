"""Memory of packed weights: aligned, apart from each other, in huge pages where the system has them."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from logitkernels.cpu.errors import BuildError
from logitkernels.cpu.library import Library
from logitkernels.cpu.memory import CHUNK_BYTES, HUGE_PAGE, PackedMemory

try:
    LIBRARY = Library()
except BuildError as error:  # pragma: no cover
    pytest.skip(f"no native kernels here: {error}", allow_module_level=True)


def test_what_is_handed_out_is_aligned_and_overlaps_nothing() -> None:
    memory = PackedMemory(LIBRARY)
    sizes = [1, 64, 65, CHUNK_BYTES // 2, CHUNK_BYTES // 3, CHUNK_BYTES // 3, CHUNK_BYTES + 5, 100]
    taken = [memory.allocate(size) for size in sizes]
    assert [len(part) for part in taken] == sizes
    assert all(part.data_ptr() % 64 == 0 for part in taken)
    spans = sorted((part.data_ptr(), part.data_ptr() + len(part)) for part in taken)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="the system has no huge pages"
)
def test_huge_pages_are_asked_for_every_byte() -> None:
    taken = PackedMemory(LIBRARY).allocate(3 * HUGE_PAGE)
    first, last = taken.data_ptr(), taken.data_ptr() + len(taken) - 1
    flags: dict[str, list[str]] = {}
    bounds = ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *values = line.split()
        if not name.endswith(":"):
            bounds = name
        elif name == "VmFlags:":
            flags[bounds] = values
    for address in (first, last):
        (found,) = (
            values
            for bounds, values in flags.items()
            if int(bounds.split("-")[0], 16) <= address < int(bounds.split("-")[1], 16)
        )
        assert "hg" in found
