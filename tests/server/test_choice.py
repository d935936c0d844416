"""A choice's tokens as deltas: what thinks, what is called, and which stop strings count."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from logitengine.link.messages import StepOutput
from logitengine.model.checkpoint.resolve import Checkpoint
from logitserve.text.choice import ChoiceText, Delta
from logitserve.text.detokenizer import Detokenizer, special_tokens_in
from logitserve.text.parser import Content, Reasoning, TextPart, ToolCall
from logitserve.text.stop_strings import StopStrings
from logitserve.text.token_table import TokenTable
from model_outputs import TOOLS, family_of, joined
from tokenizers import AddedToken, Tokenizer

SPECIAL = ["<|channel|>", "<|message|>", "<|start|>", "<|constrain|>", "<|call|>", "<|end|>"]

END = "<|im_end|>"

HARMONY_CALL = (
    "<|channel|>analysis<|message|>I call.<|end|><|start|>assistant"
    '<|channel|>commentary to=functions.plan <|constrain|>json<|message|>{"days": 2}<|call|>'
)


@pytest.fixture(scope="module")
def tokenizer(smollm2: Checkpoint) -> Tokenizer:
    """SmolLM2's tokenizer, with harmony's special tokens."""
    tokenizer = Tokenizer.from_file(str(Path(smollm2.tokenizer_path) / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    return tokenizer


@pytest.fixture(scope="module")
def table(tokenizer: Tokenizer) -> TokenTable:
    spec: dict[str, Any] = json.loads(tokenizer.to_str())
    return TokenTable(spec)


def deltas(
    tokenizer: Tokenizer,
    table: TokenTable,
    family_name: str,
    text: str,
    stops: tuple[str, ...] = (),
    tokens_per_step: int = 1,
) -> list[Delta]:
    """Return the deltas of a text whose last token is the stop token that ended it."""
    family = family_of(family_name)
    kept = special_tokens_in(table, family.delimiters)
    choice = ChoiceText(
        Detokenizer(table, kept=kept),
        StopStrings(stops),
        family.parser("", tools=TOOLS, parses_calls=True, hidden=frozenset(kept.values())),
        gate=family.thinking_gate(""),
    )
    ids, found = tokenizer.encode(text, add_special_tokens=False).ids, []
    for start in range(0, len(ids), tokens_per_step):
        step = ids[start : start + tokens_per_step]
        is_last = start + tokens_per_step >= len(ids)
        output = StepOutput(
            request_id="",
            index=0,
            token_ids=step,
            finish_reason="stop" if is_last else None,
            stop_token_id=step[-1] if is_last else None,
        )
        found.append(choice.advance(output, 0))
        if choice.finish_reason is not None:
            break
    return found


def parts_of(found: list[Delta]) -> list[TextPart]:
    return joined(part for delta in found for part in delta.parts)


@pytest.mark.parametrize("tokens_per_step", [1, 3, 1000])
def test_a_stop_token_closes_a_call_that_special_tokens_delimit(
    tokenizer: Tokenizer, table: TokenTable, tokens_per_step: int
) -> None:
    found = deltas(tokenizer, table, "harmony", HARMONY_CALL, tokens_per_step=tokens_per_step)
    assert parts_of(found) == [Reasoning("I call."), ToolCall(0, "", "plan", '{"days": 2}')]
    assert found[-1].finish_reason == "tool_calls"
    assert found[-1].stop_reason == tokenizer.token_to_id("<|call|>")


def test_special_tokens_of_a_call_that_is_cut_are_no_content(tokenizer: Tokenizer, table: TokenTable) -> None:
    found = deltas(tokenizer, table, "harmony", HARMONY_CALL.replace("}", ""))
    assert parts_of(found) == [
        Reasoning("I call."),
        Content('assistantcommentary to=functions.plan json{"days": 2'),
    ]
    assert found[-1].finish_reason == "stop"


@pytest.mark.parametrize("tokens_per_step", [1, 2, 1000])
def test_stop_strings_count_behind_the_thinking(
    tokenizer: Tokenizer, table: TokenTable, tokens_per_step: int
) -> None:
    text = f"<think>\nOne. Two.\n</think>\n\nThree. Four.{END}"
    found = deltas(tokenizer, table, "hermes", text, (".",), tokens_per_step)
    assert parts_of(found) == [Reasoning("One. Two."), Content("Three")]
    assert (found[-1].finish_reason, found[-1].stop_reason) == ("stop", ".")


def test_tokens_of_the_thinking_are_counted_however_they_come(
    tokenizer: Tokenizer, table: TokenTable
) -> None:
    thinking = tokenizer.encode("<think>\nOne. Two.\n</think>", add_special_tokens=False).ids
    text = f"<think>\nOne. Two.\n</think>\n\nThree.{END}"
    counts = {
        size: sum(delta.reasoning_tokens for delta in deltas(tokenizer, table, "hermes", text, (), size))
        for size in (1, 2, 1000)
    }
    assert len(set(counts.values())) == 1
    assert len(thinking) - 3 <= counts[1] <= len(thinking)
