"""The disguise in which a conversation is rendered to find the control tokens that are its template's own."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

_SURROGATES = range(0xD800, 0xE000)

ESCAPED = re.compile(r"\\ud[89a-f][0-9a-f]{2}")
"""A disguised character in a template's JSON of ASCII, or in its text of a list or an object."""

_ORDINARY = "_-▁"
"""Characters of control tokens that are common within names, which templates look up and compare."""

ESCAPES = "&"
"""What begins the other way to write a mark, as filters of templates undo it."""


class Disguise:
    """Replaces characters that control tokens consist of, for one conversation, and gives them back.

    Args:
        thorough: letters and digits are replaced too, so that not even a part of a control token is left. Templates
            that compare texts, or change letters, then see others.
        words: a whole text that is a word of a control token is replaced, as ``think`` in ``'<' ~ name ~ '>'``.
    """

    def __init__(
        self, characters: str, contents: list[str], taken: set[str], *, thorough: bool, words: bool
    ) -> None:
        free = (chr(code) for code in _SURROGATES if _escaped(chr(code)) not in taken)
        self._all = str.maketrans(dict(zip(characters, free, strict=False)))
        self._marks = [(chr(code), own) for code, own in self._all.items() if is_mark(chr(code))]
        self._back = [(own, chr(code)) for code, own in self._all.items()]
        self._escapes = {_escaped(own): own for own in self._all.values()}
        # A control token of letters alone is replaced where a text spells it.
        names = sorted((c for c in contents if not any(map(is_mark, c))), key=len, reverse=True)
        self._names = re.compile("|".join(map(re.escape, names))) if names else None
        self._thorough = thorough
        self._parts_of = contents if words else []

    def put_on(self, value: Any, *, is_name: bool = False) -> Any:
        """Return a text, or lists and objects of texts, disguised. Names of members are, as far as they look odd."""
        if isinstance(value, str):
            if not is_name and (self._thorough or is_part(value, self._parts_of)):
                return value.translate(self._all)
            if self._names is not None and not is_name:
                value = self._names.sub(lambda found: found[0].translate(self._all), value)
            return _replaced(value, self._marks)
        if isinstance(value, Mapping):
            return {
                self.put_on(name, is_name=True): self.put_on(member, is_name=is_name or name == "type")
                for name, member in value.items()
            }
        return [self.put_on(item, is_name=is_name) for item in value] if isinstance(value, list) else value

    def joined(self, text: str) -> str:
        """Return a disguised text in which no disguised character is escaped."""
        if "\\ud" not in text:
            return text
        return ESCAPED.sub(lambda found: self._escapes.get(found[0], found[0]), text)

    def take_off(self, text: str) -> str:
        """Return the text as it was; of the same length."""
        return _replaced(text, self._back)


def is_mark(character: str) -> bool:
    """Return whether a character is one that words and names hardly hold."""
    return not (character.isalnum() or character.isspace() or character in _ORDINARY)


def _replaced(text: str, pairs: list[tuple[str, str]]) -> str:
    for old, new in pairs:
        if old in text:
            text = text.replace(old, new)
    return text


def is_part(text: str, contents: list[str]) -> bool:
    """Return whether a whole text, but for blanks around it, is a word of a control token."""
    core = text.strip() if contents else ""
    if len(core) > max(map(len, contents), default=0):
        return False
    return bool(core) and not any(map(is_mark, core)) and any(core in content for content in contents)


def _escaped(character: str) -> str:
    return json.dumps(character)[1:-1]
