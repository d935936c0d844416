"""Grammars of whole answers: thinking, then calls of tools or a text of some form.

They are written in llguidance's Lark. A token of its own is no text there, so the strings around thinking and calls
come in pieces, and such a token is written by its id.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec
import orjson
from logitengine.grammar.vocabulary import GrammarError

from logitserve.grammars.arguments import call_body
from logitserve.grammars.lark import FREE, Pieces, Rules, symbols, text_until
from logitserve.grammars.source import GrammarKind
from logitserve.text.families.family import CallSyntax

SPACE = r"/\s{0,4}/"
"""White space between the thinking, or an opening string, and what follows. Without a bound models fill answers with it."""

ITEM_SEPARATOR = "/, ?/"

NO_JSON = r"/([^{\s](?s:.*))?/"
"""A text that cannot be taken for a call where calls are bare JSON."""


class Thinking(msgspec.Struct, forbid_unknown_fields=True):
    """Strings around the thinking.

    Attributes:
        next: what stands between the thinking and what follows; white space where it is empty.
        is_open: whether the prompt ends within it.
    """

    open: Pieces
    close: Pieces
    next: Pieces
    is_open: bool


class CallableTool(msgspec.Struct, forbid_unknown_fields=True):
    """A tool that may be called.

    Attributes:
        parameters: JSON Schema of the arguments; None where the function takes none.
        follows_schema: whether its arguments follow that schema; else they are any object.
    """

    name: str
    parameters: dict[str, Any] | None
    follows_schema: bool


class Calls(msgspec.Struct, forbid_unknown_fields=True):
    """Calls of these tools.

    Attributes:
        strings: those of ``syntax``, in pieces, by their names.
        in_text: whether there may be text beside the calls, or no call.
        parallel: whether there may be several.
    """

    syntax: CallSyntax
    strings: dict[str, Pieces]
    tools: list[CallableTool]
    in_text: bool
    parallel: bool


class Format(msgspec.Struct, forbid_unknown_fields=True):
    """The form of the text: a GrammarSource without its field."""

    kind: GrammarKind
    text: str


class AnswerForm(msgspec.Struct, forbid_unknown_fields=True):
    """What an answer is. With calls and a format it is one of the two.

    Attributes:
        answer: what opens a text that is no call.
    """

    thinking: Thinking | None = None
    answer: Pieces = []
    calls: Calls | None = None
    format: Format | None = None


def answer_grammar(form: AnswerForm, format_grammar: str | None) -> str:
    """Return the grammar in llguidance's JSON. ``format_grammar`` is the format's, in the same JSON or in Lark.

    Raises GrammarError for what cannot be honoured.
    """
    rules = Rules()
    choices = []
    grammars: list[dict[str, Any]] = []
    if form.calls is not None:
        choices.append(rules.add(_calls(form.calls, form.answer, rules)))
    if format_grammar is not None:
        grammars = _grammars(format_grammar)
        grammars[0].setdefault("name", "format")
        choices.append(f"{symbols(form.answer)} @{grammars[0]['name']}")
    answer = rules.add(" | ".join(choices))
    thinking = "" if form.thinking is None else _thinking(form.thinking, rules)
    lark = f"start: {thinking} {answer}\n{rules.text}"
    return orjson.dumps({"grammars": [{"lark_grammar": lark}, *grammars]}).decode()


def _grammars(grammar: str) -> list[dict[str, Any]]:
    """Return the parts of a grammar, the one that it starts with first."""
    if not grammar.startswith("{"):
        return [{"lark_grammar": grammar}]
    parts: list[dict[str, Any]] = orjson.loads(grammar)["grammars"]
    return parts


def _thinking(thinking: Thinking, rules: Rules) -> str:
    body = f"{text_until(thinking.close, rules)} {symbols(thinking.next) or SPACE}"
    return f"({body})" if thinking.is_open else f"({symbols(thinking.open)} {body})?"


def _body(calls: Calls, tool: CallableTool, rules: Rules) -> str:
    """Return what stands between the strings of a call. Raises GrammarError."""
    free = not tool.follows_schema
    try:
        return call_body(calls.syntax, calls.strings, tool.name, tool.parameters, rules, free=free)
    except (TypeError, AttributeError, LookupError) as error:
        raise GrammarError(
            f"the schema of {tool.name} has members of another form than JSON Schema's"
        ) from error


def _calls(calls: Calls, answer: Pieces, rules: Rules) -> str:
    strings = {name: symbols(pieces) for name, pieces in calls.strings.items()}
    bodies = [_body(calls, tool, rules) for tool in calls.tools]
    body = rules.add(" | ".join(bodies))
    more = ""
    if calls.parallel:
        one = f"{ITEM_SEPARATOR} {body}"
        if calls.syntax.form != "list":
            one = f"{strings['close']} {strings['between']} {strings['open']} {body}"
        more = f"({one})*"
    rest = f"{body} {more} {strings['close']} {strings['end']}"
    opening = [*calls.strings["begin"], *calls.strings["open"]]
    if not calls.in_text:
        return f"{symbols(opening)} {rest}"
    if answer:
        return f"{symbols(opening)} {rest} | {symbols(answer)} {FREE}"
    if not opening:
        return f"{rest} | {NO_JSON}"
    return _in_text(opening, rest, rules, parallel=calls.parallel)


def _in_text(opening: Pieces, rest: str, rules: Rules, *, parallel: bool) -> str:
    """Return a text in which ``opening`` begins what is followed by ``rest``, and nothing else."""
    trigger = _without_space(opening)
    region = rules.add(f"{text_until(trigger, rules)} {SPACE} {rest}")
    text, token_id = trigger[0]
    after = FREE if token_id is not None else rules.terminal(f"~/(?s:.*){_regex(text)}(?s:.*)/")
    return f"{region}{'*' if parallel else '?'} {after}"


def _without_space(pieces: Pieces) -> Pieces:
    """Return the string without white space at its end, which models write in other ways too."""
    kept = list(pieces)
    while kept and kept[-1][1] is None:
        text = kept.pop()[0].rstrip()
        if text:
            return [*kept, (text, None)]
    return kept


def _regex(text: str) -> str:
    return re.escape(text).replace("/", r"\/")
