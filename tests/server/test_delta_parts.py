"""A delta cut in two repeatedly: all of it comes out once, in order, and beside its token or position."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from logitengine.link.messages import Array, LogitsRows, Logprobs, PromptOutput
from logitserve.answers.delta_parts import halves
from logitserve.answers.row_blocks import to_numpy
from logitserve.text.choice import Delta
from logitserve.text.parser import Content, Reasoning
from numpy.typing import NDArray

WIDTH = 3

FLAGS = st.booleans()


def numbered(count: int, first: float) -> NDArray[np.float32]:
    """Return rows with their numbers as values."""
    return (np.arange(count, dtype=np.float32)[:, None] + first).repeat(WIDTH, axis=1)


def floats(count: int, first: float) -> Array:
    return Array("float32", (count, WIDTH), numbered(count, first).tobytes())


def logits(count: int, first: float, *, with_columns: bool) -> LogitsRows:
    ids = numbered(count, 100 + first).astype(np.int32)
    return LogitsRows(
        values=floats(count, first),
        token_ids=Array("int32", ids.shape, ids.tobytes()) if with_columns else None,
    )


def logprobs(count: int, first: float) -> Logprobs:
    own = [-float(first + row) for row in range(count)]
    return Logprobs(
        token_logprobs=own,
        ranks=list(range(count)),
        top_ids=[[row, row + 1] for row in range(count)],
        top_logprobs=[[value, value - 1] for value in own],
    )


@st.composite
def deltas(draw: st.DrawFn) -> Delta:
    """Deltas as the engine may give them, also by speculation and with the last prompt rows."""
    tokens, positions, offset = draw(st.integers(0, 9)), draw(st.integers(0, 9)), draw(st.integers(0, 5))
    has_logits, has_logprobs, has_states, with_columns = (draw(FLAGS) for _ in range(4))
    prompt = None
    if positions:
        scored = positions - draw(FLAGS)
        prompt = PromptOutput(
            offset=offset,
            logits=logits(positions, offset, with_columns=with_columns) if has_logits else None,
            logprobs=logprobs(scored, offset) if has_logprobs and scored else None,
            hidden_states=floats(positions, 50 + offset) if has_states else None,
        )
    ends = draw(FLAGS)
    return Delta(
        index=2,
        token_ids=list(range(tokens)),
        parts=[Reasoning("so "), Content("some "), Content("text")],
        text_offsets=[7 * token for token in range(tokens)],
        logits=logits(tokens, 20, with_columns=with_columns) if has_logits and tokens else None,
        logprobs=logprobs(tokens, 20) if has_logprobs and tokens else None,
        hidden_states=floats(tokens, 70) if has_states and tokens else None,
        prompt=prompt,
        finish_reason="stop" if ends else None,
        stop_reason="." if ends else None,
        reasoning_tokens=tokens // 2,
    )


def smallest_parts(delta: Delta) -> Iterator[Delta]:
    two = halves(delta)
    if two is None:
        yield delta
        return
    for half in two:
        yield from smallest_parts(half)


def found(parts: list[Delta]) -> dict[str, list[Any]]:
    """Return the joined contents of the parts, by name."""
    told: dict[str, list[Any]] = {}

    def add(name: str, values: Any) -> None:
        told.setdefault(name, []).extend(values)

    def add_rows(kind: str, of: Delta | PromptOutput) -> None:
        if of.logits is not None:
            add(f"{kind} logits", to_numpy(of.logits.values).tolist())
            if of.logits.token_ids is not None:
                add(f"{kind} columns", to_numpy(of.logits.token_ids).tolist())
        if of.logprobs is not None:
            add(f"{kind} logprobs", of.logprobs.token_logprobs)
            add(f"{kind} ranks", of.logprobs.ranks)
            add(f"{kind} top ids", of.logprobs.top_ids)
            add(f"{kind} top logprobs", of.logprobs.top_logprobs)
        if of.hidden_states is not None:
            add(f"{kind} states", to_numpy(of.hidden_states).tolist())

    for part in parts:
        add("ids", part.token_ids)
        add("offsets", part.text_offsets)
        add("text", part.text)
        add_rows("generated", part)
        if part.prompt is not None:
            add_rows("prompt", part.prompt)
    return told


@given(delta=deltas())
def test_the_parts_joined_are_the_delta(delta: Delta) -> None:
    parts = list(smallest_parts(delta))
    assert found(parts) == found([delta])
    assert {part.index for part in parts} == {delta.index}
    assert sum(part.reasoning_tokens for part in parts) == delta.reasoning_tokens


@given(delta=deltas())
def test_no_part_has_rows_of_more_than_one_token_or_position(delta: Delta) -> None:
    for part in smallest_parts(delta):
        blocks = [part.logits, None if part.prompt is None else part.prompt.logits]
        assert len(part.token_ids) <= 1
        assert part.prompt is None or not part.token_ids
        assert all(block.values.shape[0] == 1 for block in blocks if block is not None)


@given(delta=deltas())
def test_rows_stay_beside_their_tokens_and_positions(delta: Delta) -> None:
    """The row of token i is 20 + i, and that of position i is i.

    So each part shows whether its rows are its own.
    """
    was_generated = False
    for part in smallest_parts(delta):
        was_generated = was_generated or bool(part.token_ids)
        if part.logits is not None:
            rows = to_numpy(part.logits.values)[:, 0].tolist()
            assert rows == [20.0 + token for token in part.token_ids]
        if part.prompt is not None:
            assert not was_generated, "prompt rows go first"
            if part.prompt.logits is not None:
                assert to_numpy(part.prompt.logits.values)[0, 0] == part.prompt.offset
            if part.prompt.hidden_states is not None:
                assert to_numpy(part.prompt.hidden_states)[0, 0] == 50 + part.prompt.offset


@given(delta=deltas())
def test_the_text_and_the_end_come_with_the_last_part(delta: Delta) -> None:
    *others, last = smallest_parts(delta)
    assert (last.text, last.finish_reason, last.stop_reason) == (
        delta.text,
        delta.finish_reason,
        delta.stop_reason,
    )
    assert all(part.finish_reason is None and part.stop_reason is None and not part.text for part in others)


def test_a_bfloat16_row_is_cut_at_its_own_width() -> None:
    bits = np.arange(8, dtype=np.uint16).reshape(4, 2)
    rows = LogitsRows(values=Array("bfloat16", (4, 2), memoryview(bits.tobytes())))
    delta = Delta(index=0, token_ids=[1, 2, 3, 4], parts=(), text_offsets=[0, 0, 0, 0], logits=rows)
    two = halves(delta)
    assert two is not None
    assert [bytes(half.logits.values.data) for half in two if half.logits is not None] == [
        bits[:2].tobytes(),
        bits[2:].tobytes(),
    ]


@pytest.mark.parametrize("count", [0, 1])
def test_a_single_token_is_not_cut(count: int) -> None:
    assert halves(Delta(index=0, token_ids=[5] * count, parts=(), text_offsets=[0] * count)) is None
