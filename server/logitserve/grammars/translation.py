"""Translation of what clients write to llguidance's own grammars. It runs in the checker's process alone."""

from __future__ import annotations

import msgspec
import orjson
from llguidance import LLMatcher, grammar_from
from logitengine.grammar.vocabulary import GrammarError

from logitserve.grammars.answers import AnswerForm, answer_grammar
from logitserve.grammars.lark import JSON_OPTIONS
from logitserve.grammars.schemas import drop_idle
from logitserve.grammars.source import GrammarKind


def translate(kind: GrammarKind, text: str) -> str:
    """Return the grammar in llguidance's JSON. Raises GrammarError for what is no schema or grammar at all."""
    match kind:
        case "answer":
            form = msgspec.json.decode(text, type=AnswerForm)
            inner = None if form.format is None else translate(form.format.kind, form.format.text)
            return answer_grammar(form, inner)
        case "json_object":
            return LLMatcher.grammar_from_json_schema({"type": "object"}, overrides=JSON_OPTIONS)
        case "json_schema":
            schema = drop_idle(orjson.loads(text))
            return LLMatcher.grammar_from_json_schema(schema, overrides=JSON_OPTIONS)
        case "regex":
            return LLMatcher.grammar_from_regex(text)
        case "choice":
            return LLMatcher.grammar_from_regex("|".join(map(_literal, orjson.loads(text))))
        case "grammar":
            try:
                return grammar_from(kind, text)
            except (ValueError, RecursionError) as error:
                raise GrammarError(str(error)) from error


def _literal(choice: str) -> str:
    """Return the regex of one string. Lark's strings know other escapes than JSON's."""
    return "".join(char if char.isascii() and char.isalnum() else f"\\x{{{ord(char):x}}}" for char in choice)
