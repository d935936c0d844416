"""Memory of packed weights."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from logitkernels.cpu.library import Library

HUGE_PAGE = 1 << 21
CHUNK_BYTES = 1 << 26
CACHE_LINE = 64


class PackedMemory:
    """Memory that is handed out in order, from chunks in huge pages where the system has them.

    A step reads all weights once. With pages of 4 KiB the processor has forgotten each page's address by the next
    step, and a single stream is a fifth slower. Pages that nothing has written to take no memory.
    """

    def __init__(self, library: Library) -> None:
        self._library = library
        self._rest = torch.empty(0, dtype=torch.uint8)
        self._lock = threading.Lock()

    def allocate(self, nbytes: int) -> Tensor:
        """Return uninitialised memory, uint8 [nbytes], on the boundary of a cache line."""
        if nbytes > CHUNK_BYTES // 2:
            return self._chunk(nbytes)[:nbytes]
        with self._lock:
            if nbytes > len(self._rest):
                self._rest = self._chunk(CHUNK_BYTES)
            taken, self._rest = self._rest[:nbytes], self._rest[-(-nbytes // CACHE_LINE) * CACHE_LINE :]
        return taken

    def _chunk(self, nbytes: int) -> Tensor:
        """Return at least as many bytes, a whole number of huge pages."""
        size = -(-nbytes // HUGE_PAGE) * HUGE_PAGE
        reserved = torch.empty(size + HUGE_PAGE, dtype=torch.uint8)
        chunk = reserved[-reserved.data_ptr() % HUGE_PAGE :][:size]
        self._library.advise_huge_pages(chunk.data_ptr(), size)
        return chunk
