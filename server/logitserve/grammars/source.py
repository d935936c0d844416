"""A grammar as a client writes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

GrammarKind = Literal["json_object", "json_schema", "regex", "choice", "grammar", "answer"]


@dataclass(frozen=True, slots=True)
class GrammarSource:
    """What the text of an answer must follow.

    Attributes:
        kind: what ``text`` is.
        text: a JSON Schema or a list of strings as JSON; a regex; a grammar in Lark's or GBNF's syntax; empty for any JSON
            object; an AnswerForm as JSON.
        param: field of the request, for error messages.
    """

    kind: GrammarKind
    text: str
    param: str
