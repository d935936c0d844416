"""Pages of the cache that are taken before their first use."""

import ctypes
import mmap
import sys

import pytest
import torch
from logitengine.run.pages import KEPT_READY, PageTaker

PAGE = mmap.PAGESIZE
NUM_BLOCKS, BLOCK = 64, 1 << 20

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="madvise(MADV_POPULATE_WRITE) is Linux's")


@pytest.fixture
def blocks() -> torch.Tensor:
    # Memory of its own, because an allocator would hand out memory that was in use before.
    return torch.frombuffer(mmap.mmap(-1, NUM_BLOCKS * BLOCK), dtype=torch.uint8).view(NUM_BLOCKS, BLOCK)


def num_resident(blocks: torch.Tensor, first: int, last: int) -> int:
    """Count the pages with memory among those that lie entirely within blocks [first, last)."""
    start = -(-blocks[first].data_ptr() // PAGE) * PAGE
    nbytes = (last - first - 1) * BLOCK // PAGE * PAGE
    seen = (ctypes.c_ubyte * (nbytes // PAGE))()
    mincore = ctypes.CDLL(None, use_errno=True).mincore
    mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    assert mincore(start, nbytes, seen) == 0
    return sum(page & 1 for page in seen)


def take_all(taker: PageTaker, num_reached: int) -> int:
    """Return how often pages were taken."""
    return sum(1 for _ in iter(lambda: taker.take(num_reached), False))


def test_the_pages_behind_those_in_use_are_taken_and_no_more(blocks: torch.Tensor) -> None:
    ahead = int(NUM_BLOCKS * KEPT_READY)
    taker = PageTaker(blocks)
    for reached in (0, 20, 20 + ahead):
        assert take_all(taker, reached)
        ready = reached + ahead
        assert num_resident(blocks, 0, ready) == (ready - 1) * BLOCK // PAGE
        assert num_resident(blocks, ready + 4, NUM_BLOCKS) == 0
    assert take_all(taker, NUM_BLOCKS)
    assert num_resident(blocks, 0, NUM_BLOCKS) == (NUM_BLOCKS - 1) * BLOCK // PAGE
    assert not taker.take(NUM_BLOCKS)


def test_what_was_written_stays(blocks: torch.Tensor) -> None:
    blocks[::3] = 7
    assert take_all(PageTaker(blocks), NUM_BLOCKS)
    assert blocks[::3].eq(7).all()
    assert blocks[1::3].eq(0).all()


def test_a_cache_smaller_than_a_page() -> None:
    blocks = torch.zeros(2, 8, dtype=torch.uint8)
    take_all(PageTaker(blocks), 2)
    assert blocks.eq(0).all()


def test_nothing_to_take() -> None:
    assert not PageTaker(None).take(1)
