"""Grammars of chats with tools."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer
from logitengine.link.messages import ModelInfo
from scripted_engine import OpenApp
from tokenizers import Tokenizer
from tool_chats import (
    CITY,
    FIND,
    USER,
    grammar_of,
    ids_of,
    saying,
    tool,
)

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def grammar_tokenizer(thinking_model: ModelInfo) -> LLTokenizer:
    text = (Path(thinking_model.tokenizer_path) / "tokenizer.json").read_text()
    return LLTokenizer(text, eos_token=[2])


def is_taken(grammar: str | None, text: str, tokenizer: Tokenizer, grammar_tokenizer: LLTokenizer) -> bool:
    """Return whether the model may write the text with its own tokens, and end there."""
    assert grammar is not None
    matcher = LLMatcher(grammar_tokenizer, grammar)
    assert not matcher.is_error(), matcher.get_error()
    ids = ids_of(tokenizer, text)
    for token_id in ids:
        if not matcher.compute_bitmask()[token_id // 8] >> token_id % 8 & 1:
            return False
        assert matcher.consume_token(token_id)
    return matcher.is_accepting()


TIME = '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'
WRONG = '<tool_call>\n{"name": "find", "arguments": {"city": 3}}\n</tool_call>'
THINKING = "<think>\nHm <b>\n</think>\n\n"
TWO = {"tools": [tool(parameters=CITY), tool("get_time")]}
JSON_FORMAT = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": CITY}}}

FOLLOWED: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    (
        "required",
        {**TWO, "tool_choice": "required"},
        [FIND, f"{FIND}\n{TIME}", THINKING + FIND],
        ["", "Hi", WRONG, f"Hi{FIND}", THINKING, FIND.replace("find", "seek")],
    ),
    (
        "not parallel",
        {**TWO, "tool_choice": "required", "parallel_tool_calls": False},
        [FIND, TIME],
        [f"{FIND}\n{TIME}"],
    ),
    (
        "named",
        {**TWO, "tool_choice": {"type": "function", "function": {"name": "find"}}},
        [FIND, THINKING + FIND],
        [TIME, f"{FIND}\n{FIND}", "Hi"],
    ),
    (
        "auto and strict",
        {"tools": [tool(parameters=CITY, strict=True), tool("get_time", parameters=CITY)]},
        ["Hi <b>", f"Hi\n{FIND}\n{TIME} so", THINKING + "Hi", THINKING + FIND],
        [WRONG, f"Hi {WRONG}", THINKING + WRONG],
    ),
    (
        "a form after the thinking",
        JSON_FORMAT,
        ['{"city": "Bern"}', THINKING + '{"city": "Bern"}'],
        [THINKING + "Hi", "Hi", FIND],
    ),
    (
        "a form after a thinking that the prompt opens",
        {
            "messages": [USER, {"role": "assistant", "content": "<think>\nWell,"}],
            "continue_final_message": True,
            **JSON_FORMAT,
        },
        [' no.\n</think>\n\n{"city": "Bern"}'],
        ['{"city": "Bern"}', " no.\n</think>Hi"],
    ),
    (
        "a form or calls",
        {**TWO, **JSON_FORMAT},
        ['{"city": "Bern"}', THINKING + '{"city": "Bern"}', f"{FIND}\n{TIME}"],
        ["Hi", f'{{"city": "Bern"}}{FIND}'],
    ),
]
"""Fields of a body, texts that their grammar takes, and texts that it does not."""


async def test_the_model_may_write_what_the_request_allows_and_nothing_else(
    open_app: OpenApp, thinking_model: ModelInfo, tokenizer: Tokenizer, grammar_tokenizer: LLTokenizer
) -> None:
    async with open_app(saying(tokenizer, "Hi"), info=thinking_model) as app:
        assert await grammar_of(app, **TWO) is None
        assert await grammar_of(app, **TWO, tool_choice="none") is None
        for name, body, good, bad in FOLLOWED:
            grammar = await grammar_of(app, **body)
            for text in good:
                assert is_taken(grammar, text, tokenizer, grammar_tokenizer), (name, text)
            for text in bad:
                assert not is_taken(grammar, text, tokenizer, grammar_tokenizer), (name, text)
