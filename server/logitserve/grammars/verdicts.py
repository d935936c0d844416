"""Verdicts on grammars that are kept for later requests."""

from __future__ import annotations

import time
from collections import OrderedDict
from hashlib import blake2b

from logitserve.grammars.frames import Verdict
from logitserve.grammars.source import GrammarSource

MOST_BYTES = 16 << 20
ENTRY_BYTES = 512
"""Memory of a verdict beside its texts."""

RETRY_SECONDS = 60.0
"""Time after which a grammar that took too long is tried again: the machine may have been busy."""

Digest = bytes


def digest_of(source: GrammarSource) -> Digest:
    """Return what tells a grammar from others."""
    return blake2b(f"{source.kind}\0{source.text}".encode(), digest_size=32).digest()


class KeptVerdicts:
    """The verdicts that were used last, bounded in bytes. Those that a busy machine may have caused are kept for a minute."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Digest, tuple[Verdict, float | None]] = OrderedDict()
        self._nbytes = 0

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def get(self, digest: Digest) -> Verdict | None:
        kept = self._kept.get(digest)
        if kept is None:
            return None
        verdict, until = kept
        if until is not None and time.monotonic() > until:
            self._drop(digest)
            return None
        self._kept.move_to_end(digest)
        return verdict

    def add(self, digest: Digest, verdict: Verdict) -> None:
        self._drop(digest)
        is_final = verdict.outcome in ("good", "refused")
        self._kept[digest] = (verdict, None if is_final else time.monotonic() + RETRY_SECONDS)
        self._nbytes += _nbytes(verdict)
        while self._nbytes > MOST_BYTES:
            self._drop(next(iter(self._kept)))

    def _drop(self, digest: Digest) -> None:
        verdict, _ = self._kept.pop(digest, (None, None))
        if verdict is not None:
            self._nbytes -= _nbytes(verdict)


def _nbytes(verdict: Verdict) -> int:
    # Python holds a text with any astral character in four bytes a character.
    return ENTRY_BYTES + 4 * (len(verdict.grammar) + len(verdict.detail))
