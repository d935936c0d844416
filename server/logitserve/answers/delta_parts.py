"""Division of a delta, since clients that read lines bound the length of an event."""

from __future__ import annotations

from dataclasses import replace

import msgspec
from logitengine.link.messages import Array, LogitsRows, Logprobs, PromptOutput

from logitserve.text.choice import Delta
from logitserve.text.parser import ToolCall

LONGEST_TEXT = 30_000
"""Characters of one event's text: JSON writes none of them in more than six bytes, and reasoning is written twice."""

LONG_TEXT = 2_000
"""Characters from which on a text has an event of its own, apart from rows."""


def halves(delta: Delta) -> tuple[Delta, Delta] | None:
    """Return the delta as two, to be sent in turn; None where all of it belongs to one token or position.

    Prompt rows go before generated ones. Each token and each position keeps all of its rows and the values
    aligned with them. The text, the end and what is counted go with the last tokens, as text may lag behind its
    tokens anyway; a long text, as of a call that was held back and is none, goes before them, in pieces.
    """
    if delta.prompt is not None and delta.token_ids:
        return _of_prompt(delta, delta.prompt), replace(delta, prompt=None)
    if delta.prompt is not None:
        count = _num_positions(delta.prompt)
        if count < 2:
            return None
        first, second = (
            _positions(delta.prompt, *bounds) for bounds in ((0, count // 2), (count // 2, count))
        )
        return _of_prompt(delta, first), replace(delta, prompt=second)
    length = sum(len(part.text) for part in delta.parts if not isinstance(part, ToolCall))
    if length > LONGEST_TEXT or (length > LONG_TEXT and delta.token_ids):
        return _of_text(delta)
    count = len(delta.token_ids)
    if count < 2:
        return None
    first_half, second_half = (_tokens(delta, *bounds) for bounds in ((0, count // 2), (count // 2, count)))
    first_half = replace(first_half, parts=(), finish_reason=None, stop_reason=None, reasoning_tokens=0)
    return first_half, second_half


def _of_text(delta: Delta) -> tuple[Delta, Delta]:
    """Return some of the text without tokens, and the rest of the delta."""
    first, *others = delta.parts
    if not isinstance(first, ToolCall) and len(first.text) > LONGEST_TEXT:
        kind = type(first)
        others.insert(0, kind(first.text[LONGEST_TEXT:]))
        first = kind(first.text[:LONGEST_TEXT])
    return Delta(index=delta.index, token_ids=[], parts=[first], text_offsets=[]), replace(
        delta, parts=others
    )


def _of_prompt(delta: Delta, prompt: PromptOutput) -> Delta:
    return Delta(index=delta.index, token_ids=[], parts=(), text_offsets=[], prompt=prompt)


def _tokens(delta: Delta, start: int, stop: int) -> Delta:
    """Return the delta with its tokens ``start:stop`` and their rows."""
    return replace(
        delta,
        token_ids=delta.token_ids[start:stop],
        text_offsets=delta.text_offsets[start:stop],
        logits=_logits(delta.logits, start, stop),
        logprobs=_logprobs(delta.logprobs, start, stop),
        hidden_states=_states(delta.hidden_states, start, stop),
    )


def _num_positions(prompt: PromptOutput) -> int:
    """Return the number of positions that the output has rows of.

    A prompt's last one has no log-probabilities.
    """
    return max(
        0 if prompt.logits is None else prompt.logits.values.shape[0],
        0 if prompt.hidden_states is None else prompt.hidden_states.shape[0],
        0 if prompt.logprobs is None else len(prompt.logprobs.ranks),
    )


def _positions(prompt: PromptOutput, start: int, stop: int) -> PromptOutput:
    """Return the output with its rows ``start:stop``.

    Values of heads and pooled vectors do not appear in events.
    """
    return msgspec.structs.replace(
        prompt,
        offset=prompt.offset + start,
        logits=_logits(prompt.logits, start, stop),
        logprobs=_logprobs(prompt.logprobs, start, stop),
        hidden_states=_states(prompt.hidden_states, start, stop),
    )


def _logits(logits: LogitsRows | None, start: int, stop: int) -> LogitsRows | None:
    if logits is None:
        return None
    columns = logits.token_ids
    return LogitsRows(
        values=_rows(logits.values, start, stop),
        token_ids=None if columns is None else _rows(columns, start, stop),
    )


def _logprobs(logprobs: Logprobs | None, start: int, stop: int) -> Logprobs | None:
    if logprobs is None:
        return None
    return Logprobs(
        token_logprobs=logprobs.token_logprobs[start:stop],
        ranks=logprobs.ranks[start:stop],
        top_ids=logprobs.top_ids[start:stop],
        top_logprobs=logprobs.top_logprobs[start:stop],
    )


def _states(states: Array | None, start: int, stop: int) -> Array | None:
    return None if states is None else _rows(states, start, stop)


def _rows(array: Array, start: int, stop: int) -> Array:
    """Return rows ``start:stop`` of an array [rows, columns], as a view."""
    nbytes = array.nbytes // array.shape[0]
    data = memoryview(array.data).cast("B")[start * nbytes : stop * nbytes]
    return Array(array.dtype, (stop - start, *array.shape[1:]), data)
