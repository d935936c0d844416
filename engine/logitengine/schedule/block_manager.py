"""Paged KV memory: reference-counted blocks, and a prefix cache keyed by a chain of content hashes.

A full block is identified by the hash of its tokens, of the items in their place, and of the block before it.
So equal prefixes under one root share a chain. A block without references keeps its contents until it is
needed, oldest first.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from dataclasses import dataclass

from logitengine.schedule.prompt import DIGEST_BYTES
from logitengine.schedule.sequence import Sequence


@dataclass(slots=True)
class _Block:
    ref_count: int = 0
    content_hash: bytes | None = None
    token_ids: list[int] | None = None
    items_key: bytes = b""


class BlockManager:
    """Hands out block ids 0..num_blocks-1. Pure bookkeeping: no tensor is touched."""

    def __init__(self, num_blocks: int, block_size: int, *, prefix_caching: bool) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        self._prefix_caching = prefix_caching
        self._blocks = [_Block() for _ in range(num_blocks)]
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self.num_reached = 0
        """Number of the first block that was never used; no later block was used either."""
        self._by_hash: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    def blocks_needed(self, sequence: Sequence, num_tokens: int) -> int:
        """Return how many more blocks the sequence needs to hold its first ``num_tokens`` tokens."""
        return max(0, -(-num_tokens // self.block_size) - len(sequence.block_table))

    def grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Extend the block table to hold ``num_tokens`` tokens.

        Returns False and changes nothing if there is no room.
        """
        needed = self.blocks_needed(sequence, num_tokens)
        if needed > self.num_free:
            return False
        for _ in range(needed):
            sequence.block_table.append(self._take())
        return True

    def share_prefix(self, sequence: Sequence, limit: int) -> int:
        """Give an empty sequence the cached blocks of its longest known prefix of at most ``limit`` tokens.

        Returns the number of tokens found, a multiple of the block size. At least one token of a sequence
        must be left to compute, so the caller keeps ``limit`` below its length. The tokens before it are known.
        """
        while (block_id := self._find(sequence, len(sequence.block_table), limit)) is not None:
            self._blocks[block_id].ref_count += 1
            self._free.pop(block_id, None)
            sequence.block_table.append(block_id)
        sequence.num_published = len(sequence.block_table)
        return len(sequence.block_table) * self.block_size

    def extends_prefix(self, sequence: Sequence, num_tokens: int, limit: int) -> bool:
        """Whether the block after a cached prefix of ``num_tokens`` tokens is cached too."""
        return self._find(sequence, num_tokens // self.block_size, limit) is not None

    def publish(self, sequence: Sequence) -> None:
        """Register the blocks that the sequence has filled with known tokens, so that others can find them.

        Call after their keys and values were computed, or will surely be before a later step reads them.
        """
        if not self._prefix_caching:
            return
        filled = min(sequence.num_computed, sequence.num_known) // self.block_size
        for position in range(sequence.num_published, filled):
            content_hash = self._hash(sequence, position)
            # If two sequences computed the same block in one step, the first one's block is kept for sharing.
            block_id = sequence.block_table[position]
            if self._by_hash.setdefault(content_hash, block_id) == block_id:
                block = self._blocks[block_id]
                block.content_hash, block.token_ids = content_hash, self._tokens(sequence, position)
                block.items_key = self._items_key(sequence, position)
        sequence.num_published = max(sequence.num_published, filled)

    def release(self, sequence: Sequence) -> None:
        """Drop the sequence's references. The end of a chain is reused before its beginning."""
        for block_id in reversed(sequence.block_table):
            block = self._blocks[block_id]
            block.ref_count -= 1
            if block.ref_count == 0:
                self._free[block_id] = None
                if block.content_hash is None:
                    self._free.move_to_end(block_id, last=False)
        sequence.block_table.clear()
        sequence.num_published = 0

    def _take(self) -> int:
        block_id, _ = self._free.popitem(last=False)
        block = self._blocks[block_id]
        if block.content_hash is not None:
            del self._by_hash[block.content_hash]
            block.content_hash = block.token_ids = None
        block.ref_count = 1
        self.num_reached = max(self.num_reached, block_id + 1)
        return block_id

    def _find(self, sequence: Sequence, position: int, limit: int) -> int | None:
        """Return the cached block with the content of the sequence's at ``position``, if that ends within ``limit`` tokens."""
        if not self._prefix_caching or (position + 1) * self.block_size > limit:
            return None
        block_id = self._by_hash.get(self._hash(sequence, position))
        if block_id is None or not self._holds(self._blocks[block_id], sequence, position):
            return None
        return block_id

    def _holds(self, block: _Block, sequence: Sequence, position: int) -> bool:
        """Whether the block's content equals the sequence's. Equal hashes do not prove it."""
        return block.token_ids == self._tokens(sequence, position) and block.items_key == self._items_key(
            sequence, position
        )

    def _items_key(self, sequence: Sequence, position: int) -> bytes:
        return sequence.prompt.items_key(position * self.block_size, (position + 1) * self.block_size)

    def _tokens(self, sequence: Sequence, position: int) -> list[int]:
        return sequence.token_ids[position * self.block_size : (position + 1) * self.block_size]

    def _hash(self, sequence: Sequence, position: int) -> bytes:
        """Return the hash of a block of known tokens. Those of the blocks before it were computed already."""
        hashes = sequence.block_hashes
        if position == len(hashes):
            parent = hashes[-1] if hashes else sequence.prompt.root
            tokens = array("q", self._tokens(sequence, position)).tobytes()
            content = parent + tokens + self._items_key(sequence, position)
            hashes.append(hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest())
        return hashes[position]
