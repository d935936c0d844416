"""Pieces of llguidance's Lark: rules with names of their own, strings, tokens, and JSON of a schema."""

from __future__ import annotations

from typing import Any

import orjson
from llguidance import LLMatcher
from logitengine.grammar.vocabulary import GrammarError

from logitserve.grammars.schemas import drop_idle

Pieces = list[tuple[str, int | None]]
"""A string in pieces: each is text, or one token of its own with its id."""

FREE = "/(?s:.*)/"
"""Any text. Tokens of their own are none."""

JSON_OPTIONS: Any = {
    "whitespace_flexible": False,
    "item_separator": ", ?",
    "key_separator": ": ?",
    "coerce_one_of": False,
    "lenient": False,
}
"""One line, with or without a space after ',' and ':'.

Where whitespace may stand anywhere, models fill whole answers with it.
"""


class Rules:
    """The rules and terminals of a grammar."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    @property
    def text(self) -> str:
        return "\n".join(self._lines)

    def add(self, body: str, options: str = "") -> str:
        """Add a rule and return its name."""
        name = f"r{len(self._lines)}"
        self._lines.append(f"{name}{options}: {body}")
        return name

    def reserve(self) -> str:
        """Return the name of a rule that ``define`` adds later, for rules that contain themselves."""
        self._lines.append("")
        return f"r{len(self._lines) - 1}"

    def define(self, name: str, body: str) -> None:
        """Add the rule of a reserved name."""
        self._lines[int(name[1:])] = f"{name}: {body}"

    def terminal(self, body: str) -> str:
        """Add a terminal, which takes operators on expressions, and return its name."""
        name = f"T{len(self._lines)}"
        self._lines.append(f"{name}: {body}")
        return name

    def json(self, schema: dict[str, Any]) -> str:
        """Add the rule of a JSON value. Raises GrammarError for a schema that cannot be honoured."""
        kept = drop_idle(schema)
        grammar = LLMatcher.grammar_from_json_schema(kept, overrides=JSON_OPTIONS)
        error = LLMatcher.validate_grammar(grammar)
        if error:
            raise GrammarError(" ".join(error.split()))
        written = orjson.dumps({**kept, "x-guidance": JSON_OPTIONS}).decode()
        return self.add(f"%json {written}")


def quoted(text: str) -> str:
    """Return a string as Lark writes it, which knows fewer escapes than JSON."""
    if text and text.replace("\n", "").isprintable():
        return orjson.dumps(text).decode()
    # Parentheses, since // begins a comment.
    return "/(" + "".join(f"\\x{{{ord(character):x}}}" for character in text) + ")/"


def symbols(pieces: Pieces) -> str:
    """Return the string as a sequence of terminals."""
    return " ".join(quoted(text) if token_id is None else f"<[{token_id}]>" for text, token_id in pieces)


def text_until(pieces: Pieces, rules: Rules) -> str:
    """Return any text up to the string, which must not be empty, and the string."""
    text, token_id = pieces[0]
    if token_id is not None:
        return f"{FREE} {symbols(pieces)}"
    until = rules.add(FREE, f"[suffix={quoted(text)}]")
    return f"{until} {symbols(pieces[1:])}"
