"""A prompt: token ids, encoder items in place of some of them, and the root of its blocks' hashes."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from dataclasses import dataclass
from itertools import islice, takewhile
from operator import attrgetter

from logitengine.link.messages import PromptItem

DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class Prompt:
    """Beginning of a sequence.

    Attributes:
        token_ids: at least one token id.
        items: items in the order of their positions, without overlap.
        root: bytes that the hash of the first block continues; see `root_digest`.
    """

    token_ids: list[int]
    items: tuple[PromptItem, ...] = ()
    root: bytes = b""

    def __len__(self) -> int:
        return len(self.token_ids)

    def items_key(self, start: int, stop: int) -> bytes:
        """Return a key of the items at the positions ``start:stop``; empty if there are none."""
        if not self.items:
            return b""
        first = bisect_right(self.items, start, key=attrgetter("stop"))
        return b"".join(
            (item.start - start).to_bytes(8, "little", signed=True)
            + len(item.digest).to_bytes(8, "little")
            + item.digest
            for item in takewhile(lambda item: item.start < stop, islice(self.items, first, None))
        )


def item_digest(root: bytes, item: PromptItem) -> bytes:
    """Return the digest of an item under a root: equal items of different roots share nothing."""
    return hashlib.blake2b(root + item.digest, digest_size=DIGEST_BYTES).digest()


def root_digest(*, cache_salt: str | None = None, adapter: str = "", weights_version: int = 0) -> bytes:
    """Digest everything that must differ so that equal tokens never share blocks."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in ((cache_salt or "").encode(), adapter.encode(), str(weights_version).encode()):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()
