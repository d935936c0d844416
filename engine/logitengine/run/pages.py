"""Memory pages that are taken from the system before a step writes to them."""

from __future__ import annotations

import ctypes
import logging
import os
import sys

from torch import Tensor

logger = logging.getLogger(__name__)

MADV_POPULATE_WRITE = 23
"""Constant of madvise(2), since Linux 5.14."""

PIECE_BYTES = 2 << 20

KEPT_READY = 1 / 8
"""Share of all blocks that is kept ready beyond the blocks in use."""


class PageTaker:
    """Takes the pages of a cache's next blocks while the engine has nothing to compute.

    The system zeroes a page at the first write, which here is in the middle of a step that everyone waits
    for. It costs up to 10 microseconds for 4 KiB where a virtual machine's host has to find the memory first.
    On a system without this call nothing is lost.

    Args:
        blocks: [num_blocks, ...], contiguous, on the CPU. None: there is nothing to take.
    """

    def __init__(self, blocks: Tensor | None) -> None:
        self._blocks = blocks  # keeps the memory alive
        self._start = self._next = self._end = 0
        if blocks is None or sys.platform != "linux":
            return
        page = os.sysconf("SC_PAGE_SIZE")
        self._start = self._next = -(-blocks.data_ptr() // page) * page
        self._end = blocks.data_ptr() + blocks.nbytes
        self._num_blocks = len(blocks)
        self._madvise = ctypes.CDLL(None, use_errno=True).madvise
        self._madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

    def take(self, num_reached: int) -> bool:
        """Take a few pages, in a few milliseconds, if the first ``num_reached`` blocks are in use.

        Returns False if all pages that should be ready are.
        """
        if self._next >= self._end:
            return False
        ready = num_reached / self._num_blocks + KEPT_READY
        if self._next - self._start >= ready * (self._end - self._start):
            return False
        piece = min(PIECE_BYTES, self._end - self._next)
        if self._madvise(self._next, piece, MADV_POPULATE_WRITE):
            logger.debug("no pages are taken in advance: %s", os.strerror(ctypes.get_errno()))
            self._next = self._end
            return False
        self._next += piece
        return True
