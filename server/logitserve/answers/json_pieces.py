"""JSON in pieces, so that a large answer is never copied to be whole."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import orjson
from numpy.typing import NDArray

PLACE = b"\0"
"""Stands for a piecewise member in what orjson writes, which never holds this byte: in strings it is escaped."""

LONGEST_JOINED = 256 << 10
"""Bytes up to which neighbouring pieces are sent as one."""


class JsonPieces:
    """A JSON value as pieces of its text."""

    __slots__ = ("pieces",)

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = pieces


class JsonArray:
    """A JSON array that grows; what is added is written at once."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self.nbytes = 0

    def extend(self, items: Sequence[Any] | NDArray[Any]) -> None:
        """Append ``items``, or an array's rows. Numbers that JSON lacks become null."""
        if len(items):
            self._add(orjson.dumps(items, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1])

    def extend_from(self, other: JsonArray) -> None:
        """Append what another array holds."""
        for piece in other._pieces:
            self._add(piece)

    def finish(self) -> JsonPieces:
        pieces = [part for piece in self._pieces for part in (b",", piece)]
        return JsonPieces([b"[", *pieces[1:], b"]"])

    def _add(self, piece: bytes) -> None:
        self._pieces.append(piece)
        self.nbytes += len(piece) + 1


def dumps(document: Any) -> list[bytes]:
    """The document's text in pieces; those of its JsonPieces are not copied."""
    members: list[JsonPieces] = []

    def place(value: object) -> orjson.Fragment:
        if not isinstance(value, JsonPieces):
            raise TypeError(type(value).__name__)
        members.append(value)
        return orjson.Fragment(PLACE)

    first, *others = orjson.dumps(document, default=place, option=orjson.OPT_SERIALIZE_NUMPY).split(PLACE)
    pieces = [first]
    for member, text in zip(members, others, strict=True):
        pieces += [*member.pieces, text]
    return pieces


def joined(pieces: deque[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    """The pieces, short neighbours as one. What was yielded is no longer in ``pieces``."""
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
