"""Answers that think and call: streamed and whole, with every row once."""

from __future__ import annotations

import json
from typing import Any

import pytest
from logitengine.link.messages import GenerationRequest, ModelInfo
from logitserve.text.families.choose import family_names, load_family
from model_outputs import OUTPUTS, TOOLS
from scripted_engine import OpenApp, Step
from tokenizers import Tokenizer
from tool_chats import (
    CHAT,
    CITY,
    USER,
    ask,
    at_once,
    ids_of,
    saying,
    stream,
    tool,
)

pytestmark = pytest.mark.anyio


def joined(events: list[Any]) -> dict[str, Any]:
    """Return the message that a client makes of a stream, and check the order of each call's pieces."""
    message: dict[str, Any] = {"content": "", "reasoning": "", "reasoning_content": "", "tool_calls": []}
    for event in events:
        for choice in event["choices"]:
            delta = choice["delta"]
            for name in ("content", "reasoning", "reasoning_content"):
                message[name] += delta.get(name) or ""
            for piece in delta.get("tool_calls", []):
                if "id" in piece:
                    assert piece["index"] == len(message["tool_calls"])
                    assert piece["function"]["arguments"] == ""
                    message["tool_calls"].append({key: piece[key] for key in ("id", "type", "function")})
                else:
                    function = message["tool_calls"][piece["index"]]["function"]
                    function["arguments"] += piece["function"]["arguments"]
    return message


def spoken(message: dict[str, Any]) -> tuple[Any, ...]:
    """Return what a message says, without the ids of its calls, which are drawn."""
    functions = [call["function"] for call in message.get("tool_calls", [])]
    return (
        message["content"] or "",
        message.get("reasoning", ""),
        message.get("reasoning_content", ""),
        functions,
    )


CALLS = (
    '<tool_call>\n{"name": "find", "arguments": {"city": "Zürich \\"x\\""}}\n</tool_call>\n'
    '<tool_call>\n{"name": "find", "arguments": {"city":"</tool>"}}\n</tool_call>'
)
TEXTS = {
    "text": "Hello there.",
    "thinking": "<think>\nHm, no.\n</think>\n\nHello.",
    "calls": CALLS,
    "all": f"<think>\nTwo.\n</think>\n\nLet me see.\n{CALLS}",
    "malformed": '<tool_call>\n{"name": "find", "arguments": }\n</tool_call> so',
    "cut": '<think>\nHm</think>Well <tool_call>\n{"name": "find", "argum',
}


WITH_ROWS: dict[str, Any] = {"return_logits": {"top_k": 4}, "logprobs": True, "top_logprobs": 1}


def check_rows(whole: dict[str, Any], events: list[Any], plain: dict[str, Any], ids: list[int]) -> None:
    """Check that an answer, its stream and a run without a parser have the same message and the rows of the same ids."""
    choice, plain_choice = whole["choices"][0], plain["choices"][0]
    assert spoken(joined(events)) == spoken(choice["message"])
    assert choice["token_ids"] == plain_choice["token_ids"] == ids
    assert choice["logits"] == plain_choice["logits"]
    assert choice["logprobs"] == plain_choice["logprobs"]
    assert choice["logits"]["generated"]["values"] == [[p, p + 1, p + 2, p + 3] for p in range(len(ids))]
    chunks = [chunk for event in events for chunk in event["choices"]]
    assert [i for chunk in chunks for i in chunk.get("token_ids", [])] == ids
    rows = [row for chunk in chunks if "logits" in chunk for row in chunk["logits"]["generated"]["values"]]
    assert rows == choice["logits"]["generated"]["values"]
    logprobs = [entry for chunk in chunks if chunk["logprobs"] for entry in chunk["logprobs"]["content"]]
    assert logprobs == choice["logprobs"]["content"]
    assert [chunk["finish_reason"] for chunk in chunks if chunk["finish_reason"]] == [choice["finish_reason"]]
    assert plain_choice["message"].get("tool_calls") is None


@pytest.mark.parametrize("name", TEXTS)
async def test_a_stream_says_what_the_whole_answer_says_with_every_row_once(
    open_app: OpenApp, thinking_model: ModelInfo, tokenizer: Tokenizer, name: str
) -> None:
    """Rows, log-probabilities and ids are those of the engine's outputs, in order, whatever the parser holds back."""
    text = TEXTS[name]
    wants = {**WITH_ROWS, "tools": [tool(parameters=CITY)]}
    async with open_app(saying(tokenizer, text, with_rows=True), info=thinking_model) as app:
        whole = await ask(app, **wants)
        events = await stream(app, **wants)
        plain = await ask(app, **wants, tool_choice="none")
    check_rows(whole, events, plain, ids_of(tokenizer, text))
    choice = whole["choices"][0]
    has_calls = name in ("calls", "all")
    assert choice["finish_reason"] == ("tool_calls" if has_calls else "stop")
    assert (choice["message"]["content"] is None) == (name == "calls")
    assert len(choice["message"].get("tool_calls", [])) == (2 if has_calls else 0)


@pytest.mark.parametrize("family", family_names())
async def test_every_output_of_a_family_keeps_its_rows(
    open_app: OpenApp, thinking_model: ModelInfo, tokenizer: Tokenizer, family: str
) -> None:
    said: list[str] = []

    def script(request: GenerationRequest) -> list[Step]:
        return saying(tokenizer, said[-1], with_rows=True)(request)

    outputs = [output for output in OUTPUTS if output.family == family and not output.prompt and output.text]
    listed = [tool(tool_.name, parameters=tool_.parameters or {"type": "object"}) for tool_ in TOOLS]
    reads_calls = load_family(family).reads_calls
    wants = {**WITH_ROWS, "tools": listed} if reads_calls else WITH_ROWS
    async with open_app(script, info=thinking_model, tool_template=family) as app:
        for output in outputs:
            said.append(output.text)
            whole, events = await ask(app, **wants), await stream(app, **wants)
            plain = await ask(app, **wants, **({"tool_choice": "none"} if reads_calls else {}))
            check_rows(whole, events, plain, ids_of(tokenizer, output.text))
            calls = whole["choices"][0]["message"].get("tool_calls", [])
            assert [call["function"]["name"] for call in calls] == [name for name, _ in output.calls], (
                output.name
            )
    assert said


async def test_thinking_comes_under_both_names_and_is_counted(
    open_app: OpenApp, thinking_model: ModelInfo, tokenizer: Tokenizer
) -> None:
    thinking = "<think>\nHm, no.\n</think>"
    async with open_app(saying(tokenizer, f"{thinking}\n\nHello."), info=thinking_model) as app:
        whole = await ask(app)
        events = await stream(app, stream_options={"include_usage": True, "continuous_usage_stats": True})
    message = whole["choices"][0]["message"]
    assert message["content"] == "Hello."
    assert message["reasoning"] == message["reasoning_content"] == "Hm, no."
    count = len(tokenizer.encode(thinking, add_special_tokens=False).ids)
    assert whole["usage"]["completion_tokens_details"] == {"reasoning_tokens": count}
    counts = [event["usage"]["completion_tokens_details"]["reasoning_tokens"] for event in events]
    assert counts == sorted(counts)
    assert counts[-1] == count


async def test_a_call_comes_in_events_that_a_reader_of_lines_takes(
    open_app: OpenApp, thinking_model: ModelInfo, tokenizer: Tokenizer
) -> None:
    """Both a call with half a megabyte of arguments and a text of that length that is no call after all."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    longest = max((token for token in vocabulary if token.isalnum() and token.isascii()), key=len)
    value = [vocabulary[longest]] * (500_000 // len(longest))
    for name, is_call in (('"find"', True), ("", False)):
        head = f'<tool_call>\n{{"name": {name}, "arguments": {{"city": "'
        tail = '"}}\n</tool_call>'
        ids = [*ids_of(tokenizer, head), *value, *ids_of(tokenizer, tail)]
        async with open_app(at_once(ids), info=thinking_model) as app:
            answer = await app.post(
                CHAT, {"messages": [USER], "tools": [tool()], "stream": True, "return_token_ids": True}
            )
        lines = answer.text.splitlines()
        assert max(map(len, lines)) <= 400_000
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert [
            i for event in events for choice in event["choices"] for i in choice.get("token_ids", [])
        ] == ids
        message, text = joined(events), longest * len(value)
        if is_call:
            assert message["tool_calls"][0]["function"]["arguments"] == f'{{"city": "{text}"}}'
        else:
            assert message["content"] == head + text + tail
