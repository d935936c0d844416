"""JSON in pieces, so that a large answer is never copied to be whole."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

PLACE = b"\0"
"""Placeholder of a piecewise member in orjson's output.

The byte is escaped in strings, so it never occurs otherwise.
"""

LINE_BREAKS = {"\u2028": b"\\u2028", "\u2029": b"\\u2029", "\u0085": b"\\u0085"}
"""Characters that JSON need not escape, but at which some clients split lines, httpx among them."""

LONGEST_JOINED = 256 << 10
"""Bytes up to which neighbouring pieces are sent as one."""


class JsonPieces:
    """A JSON value as pieces of its text."""

    __slots__ = ("pieces",)

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = pieces


class JsonArray:
    """A JSON array that grows; items are written as they are added."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self.nbytes = 0

    def extend(self, items: Sequence[Any] | NDArray[Any]) -> None:
        """Append ``items``, or an array's rows. Numbers that JSON lacks become null."""
        if len(items):
            written = orjson.dumps(items, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1]
            self._add(written if isinstance(items, np.ndarray) else on_one_line(written))

    def extend_from(self, other: JsonArray) -> None:
        """Append the items of another array."""
        for piece in other._pieces:
            self._add(piece)

    def finish(self) -> JsonPieces:
        pieces = [part for piece in self._pieces for part in (b",", piece)]
        return JsonPieces([b"[", *pieces[1:], b"]"])

    def _add(self, piece: bytes) -> None:
        self._pieces.append(piece)
        self.nbytes += len(piece) + 1


def on_one_line(text: bytes) -> bytes:
    """Return JSON whose strings hold no character at which a reader may break a line."""
    if text.isascii():
        return text
    for character, escape in LINE_BREAKS.items():
        text = text.replace(character.encode(), escape)
    return text


def dumps(document: Any) -> list[bytes]:
    """Return the document's text in pieces, on one line.

    Those of its JsonPieces are neither copied nor searched.
    """
    members: list[JsonPieces] = []

    def place(value: object) -> orjson.Fragment:
        if not isinstance(value, JsonPieces):
            raise TypeError(type(value).__name__)
        members.append(value)
        return orjson.Fragment(PLACE)

    text = orjson.dumps(document, default=place, option=orjson.OPT_SERIALIZE_NUMPY)
    first, *others = on_one_line(text).split(PLACE)
    pieces = [first]
    for member, between in zip(members, others, strict=True):
        pieces += [*member.pieces, between]
    return pieces


def joined(pieces: deque[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    """Yield the pieces, short neighbours as one. A piece leaves ``pieces`` before it is yielded."""
    short: list[bytes | memoryview] = []
    num_bytes = 0
    while pieces:
        piece = pieces.popleft()
        if short and num_bytes + len(piece) > LONGEST_JOINED:
            yield b"".join(short)
            short, num_bytes = [], 0
        short.append(piece)
        num_bytes += len(piece)
        del piece
    if short:
        yield b"".join(short)
