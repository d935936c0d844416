"""JSON that a model writes, read as it comes and kept as it was written."""

from __future__ import annotations

import re

import msgspec

_MARKS = re.compile(r'["\\{}\[\]]')

_BLANK = re.compile(r"\s*")


class JsonScanner:
    """Finds the ends of objects and lists in a text that comes in pieces.

    Args:
        separators: characters that may stand between two of them, beside white space.
        only_first: whether all that follows the first is left unread.

    Attributes:
        in_string: whether the text so far ends within a string.
        spans: start and end of each whole object or list, in characters of the text.
        is_refuted: whether something else than objects and lists stands in the text.
    """

    def __init__(self, separators: str = "", *, only_first: bool = False) -> None:
        self._only_first = only_first
        self._between = re.compile(rf"[\s{re.escape(separators)}]*") if separators else _BLANK
        self._depth = 0
        self._is_escaped = False
        self._num_read = 0
        self._start = 0
        self.in_string = False
        self.spans: list[tuple[int, int]] = []
        self.is_refuted = False

    @property
    def is_between(self) -> bool:
        """Whether the text so far ends outside of all objects and lists."""
        return self._depth == 0

    def push(self, text: str) -> int | None:
        """Read on. Return where in ``text`` the first object or list ended, where that is all to be read."""
        position = 1 if self._is_escaped and text else 0
        self._is_escaped = self._is_escaped and not text
        while position < len(text) and not self.is_refuted:
            if not self._depth:
                position = self._outside(text, position)
                continue
            position = self._inside(text, position)
            if not self._depth:
                self.spans.append((self._start, self._num_read + position))
                if self._only_first:
                    return position
        self._num_read += len(text)
        return None

    def _outside(self, text: str, position: int) -> int:
        found = self._between.match(text, position)
        position = position if found is None else found.end()
        if position < len(text):
            self.is_refuted = text[position] not in "{["
            self._start = self._num_read + position
            self._depth = 0 if self.is_refuted else 1
            position += 1
        return position

    def _inside(self, text: str, position: int) -> int:
        """Return the position behind the next mark."""
        found = _MARKS.search(text, position)
        if found is None:
            return len(text)
        mark = found.group()
        if self.in_string:
            if mark == "\\":
                self._is_escaped = found.end() == len(text)
                return found.end() + 1
            self.in_string = mark != '"'
        elif mark == '"':
            self.in_string = True
        elif mark != "\\":
            self._depth += 1 if mark in "{[" else -1
        return found.end()


def members(text: str) -> dict[str, str] | None:
    """Return an object's members by name, each as the text that it is; None where the text is no JSON object."""
    try:
        raw = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return None
    return {name: bytes(value).decode() for name, value in raw.items()}


def items(text: str) -> list[str] | None:
    """Return a list's items, each as the text that it is; None where the text is no JSON list."""
    try:
        raw = msgspec.json.decode(text, type=list[msgspec.Raw])
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return None
    return [bytes(item).decode() for item in raw]


def string(text: str) -> str | None:
    """Return the string that JSON text is; None where it is none."""
    try:
        return msgspec.json.decode(text, type=str)
    except (msgspec.DecodeError, UnicodeError):
        return None


def object_text(text: str) -> str | None:
    """Return the text of an object, or of the object that a JSON string holds; None where there is none."""
    text = text.strip()
    if text.startswith('"'):
        text = (string(text) or "").strip()
    return text if text.startswith("{") and members(text) is not None else None
