"""What the server and its checker of grammars say to each other: msgpack, each piece after its length."""

from __future__ import annotations

from typing import Literal

import msgspec

from logitserve.grammars.source import GrammarKind

LENGTH_BYTES = 4

MOST_BYTES = 1 << 30
"""Memory that compiling one grammar may take beside what the process has at its start."""

Outcome = Literal["good", "refused", "unsupported", "timeout", "memory", "died"]


class Question(msgspec.Struct, array_like=True):
    """A grammar to check within so many seconds."""

    number: int
    kind: GrammarKind
    text: str
    seconds: float


class Verdict(msgspec.Struct, array_like=True):
    """What became of a question. The first one, without a question, says whether any can be asked.

    Attributes:
        number: the question's.
        grammar: in llguidance's JSON, where the outcome is "good".
        detail: why it cannot be honoured, or how its process died.
    """

    number: int
    outcome: Outcome
    grammar: str = ""
    detail: str = ""


LONGEST_REASON = 300


def shortened(reason: str) -> str:
    """Return what a parser said, in a bounded length."""
    return reason if len(reason) <= LONGEST_REASON else reason[:LONGEST_REASON] + "..."


def framed(piece: Question | Verdict) -> bytes:
    """Return the piece after its length."""
    content = msgspec.msgpack.encode(piece)
    return len(content).to_bytes(LENGTH_BYTES, "little") + content
