"""What the server and its checker of grammars say to each other: msgpack, each piece after its length."""

from __future__ import annotations

import msgspec

from logitserve.grammars.source import GrammarKind

LENGTH_BYTES = 4


class Question(msgspec.Struct, array_like=True):
    """A grammar to check."""

    kind: GrammarKind
    text: str


class Verdict(msgspec.Struct, array_like=True):
    """The grammar in llguidance's JSON, or why it cannot be honoured. The first one tells whether any can."""

    grammar: str = ""
    error: str | None = None
