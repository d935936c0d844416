"""Tools of a chat: how they reach the prompt, how calls are read from the answer, and which grammar it follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import msgspec

from logitserve.errors import BadRequestError
from logitserve.grammars.answers import AnswerForm, CallableTool, Calls, Format, Thinking
from logitserve.grammars.source import GrammarSource
from logitserve.jobs.prompts import Conversation, PromptSource, TokenizedPrompt
from logitserve.text.families.family import Family
from logitserve.text.tool_prompt import with_tools_in_system
from logitserve.text.tools import Tool

if TYPE_CHECKING:
    from logitserve.state import Model

STRINGS = ("begin", "open", "middle", "close", "between", "end", "quote")
"""Strings of a CallSyntax that may be tokens of their own."""


@dataclass(frozen=True, slots=True)
class CallOptions:
    """What a chat may call, and must.

    Attributes:
        named: the only function to call.
        parallel: whether a grammar allows several calls.
    """

    tools: Sequence[Tool] = ()
    must_call: bool = False
    may_call: bool = False
    named: str | None = None
    parallel: bool = True


def settle_tools(
    source: PromptSource, calls: CallOptions, model: Model
) -> tuple[PromptSource, Family | None]:
    """Return the prompts with their tools where the template reads them, and the family that answers are read by.

    Raises BadRequestError where the model cannot call as the request asks.
    """
    family = model.family
    if not isinstance(source, Conversation) or not calls.tools or not calls.may_call:
        return source, family
    has_syntax = family is not None and family.calls is not None
    if model.tokenizer.knows_tools:
        is_written = calls.must_call or any(tool.strict for tool in calls.tools)
        if not has_syntax and (is_written or family is None or not family.reads_calls):
            raise _unknown_syntax("tools")
        return source, family
    if not calls.must_call:
        raise BadRequestError(
            "This model's chat template knows no tools, so 'tool_choice' cannot be auto, its default; \"required\" and a "
            'named function work by a grammar, and "none" leaves the tools out.',
            param="tool_choice",
            code="unsupported_parameter",
        )
    family = model.calling_family
    assert family.calls is not None  # noqa: S101 - that is what calling_family is for
    messages = with_tools_in_system(source.turns.messages, source.turns.tools, family.calls)
    return replace(source, turns=replace(source.turns, messages=messages, tools=[])), family


def _unknown_syntax(param: str) -> BadRequestError:
    return BadRequestError(
        "'tools' are rendered by this model's chat template, but how the model writes calls is not known; the "
        "server's option --tool-template says it.",
        param=param,
        code="unsupported_parameter",
    )


def answer_source(
    format_: GrammarSource | None,
    calls: CallOptions,
    family: Family | None,
    prompt: TokenizedPrompt,
    model: Model,
) -> GrammarSource | None:
    """Return what the chat's answer follows: thinking where the model thinks, then calls, the format or either."""
    is_strict = calls.may_call and any(tool.strict for tool in calls.tools)
    with_calls = (
        calls.must_call or is_strict or (format_ is not None and calls.may_call and bool(calls.tools))
    )
    if family is None or not (with_calls or format_ is not None):
        return format_
    thinking = _thinking(family, prompt, model)
    if thinking is None and not with_calls:
        return format_
    if calls.must_call:
        format_ = None  # the answer has no text that it could be the form of
    form = AnswerForm(
        thinking=thinking,
        answer=[] if family.reasoning is None else model.tokenizer.pieces(family.reasoning.answer),
        calls=_calls(calls, family, model, with_text=format_ is None) if with_calls else None,
        format=None if format_ is None else Format(format_.kind, format_.text),
    )
    param = "tools" if with_calls or format_ is None else format_.param
    return GrammarSource("answer", msgspec.json.encode(form).decode(), param)


def _thinking(family: Family, prompt: TokenizedPrompt, model: Model) -> Thinking | None:
    """Return how the answer may begin with thinking; None where the model does not think."""
    syntax, tokenizer = family.reasoning, model.tokenizer
    if syntax is None:
        return None
    parser = family.parser(prompt.text or "", tools=(), parses_calls=False)
    is_open = parser.in_reasoning
    if not (is_open or parser.is_start or syntax.anywhere):
        return None  # the prompt has ended the thinking, or goes on behind it
    opening = syntax.open.strip()
    pieces = tokenizer.pieces(opening)
    # A family's older models do not think, and have no token for it.
    if not is_open and all(token_id is None for _, token_id in pieces) and not tokenizer.writes(opening):
        return None
    # Where messages have parts, the next one opens anew.
    following = family.calls.between if syntax.answer and family.calls is not None else ""
    return Thinking(pieces, tokenizer.pieces(syntax.close.strip()), tokenizer.pieces(following), is_open)


def _calls(calls: CallOptions, family: Family, model: Model, *, with_text: bool) -> Calls:
    syntax = family.calls
    if syntax is None:
        raise _unknown_syntax("response_format")
    tools = [tool for tool in calls.tools if calls.named in (None, tool.name)]
    strings = {name: model.tokenizer.pieces(getattr(syntax, name)) for name in STRINGS}
    parallel = calls.parallel and calls.named is None
    if syntax.ends_with_answer and any(i in model.info.eos_token_ids for _, i in strings["close"]):
        # The grammar's own end lets the model end its answer, by this token or another.
        strings["close"] = []
        parallel = False
    return Calls(
        syntax=syntax,
        strings=strings,
        tools=[CallableTool(tool.name, tool.parameters, calls.must_call or tool.strict) for tool in tools],
        in_text=with_text and not calls.must_call,
        parallel=parallel,
    )
