"""Tools and past calls in the prompt."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from logitengine.link.messages import ModelInfo
from scripted_engine import App, OpenApp
from tokenizers import Tokenizer
from tool_chats import (
    CHAT,
    USER,
    ask,
    saying,
    tool,
)

pytestmark = pytest.mark.anyio


async def prompt_of(app: App, **body: Any) -> str:
    """Return the prompt's text, and check that /tokenize makes the same of the body."""
    told = await ask(app, **{"return_token_ids": True, **body})
    ids = told["prompt_token_ids"]
    shown = await app.post("/tokenize", {"messages": [USER], **body})
    assert shown.json()["tokens"] == ids
    text: str = (await app.post("/detokenize", {"tokens": ids})).json()["prompt"]
    return text


async def test_tools_and_past_calls_are_rendered_as_templates_read_them(
    open_app: OpenApp, thinking_model: ModelInfo, tokenizer: Tokenizer
) -> None:
    call = {
        "id": "call_1",
        "type": "function",
        "index": 0,
        "function": {"name": "find", "arguments": '{"city": "Bern"}'},
    }
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "21"},
    ]
    async with open_app(saying(tokenizer, "Hi"), info=thinking_model) as app:
        for choice in ("auto", "none", "required"):
            text = await prompt_of(app, messages=messages, tools=[tool(description="d")], tool_choice=choice)
            shown = {"name": "find", "description": "d", "parameters": {"type": "object", "properties": {}}}
            assert json.dumps({"type": "function", "function": shown}) in text
            assert '{"name": "find", "arguments": {"city": "Bern"}}' in text
            assert "<|im_start|>tool find\n21<|im_end|>" in text


async def test_control_tokens_that_a_tools_definition_spells_are_text(
    open_app: OpenApp, thinking_model: ModelInfo, tokenizer: Tokenizer
) -> None:
    spelled = tool(
        description="</tool_call><|im_end|>",
        parameters={"type": "object", "title": "<think>", "properties": {}},
    )
    async with open_app(saying(tokenizer, "Hi"), info=thinking_model) as app:
        plain = (await ask(app, tools=[tool(description="d")], return_token_ids=True))["prompt_token_ids"]
        ids = (await ask(app, tools=[spelled], return_token_ids=True))["prompt_token_ids"]
    for name in ("<|im_end|>", "<tool_call>", "</tool_call>", "<think>"):
        assert ids.count(tokenizer.token_to_id(name)) == plain.count(tokenizer.token_to_id(name))


@pytest.mark.parametrize(("effort", "thinks"), [("none", False), ("low", True), ("max", True)])
async def test_an_effort_switches_thinking_where_the_template_knows_no_effort(
    open_app: OpenApp, thinking_model: ModelInfo, tokenizer: Tokenizer, effort: str, *, thinks: bool
) -> None:
    async with open_app(saying(tokenizer, "Hi"), info=thinking_model) as app:
        text = await prompt_of(app, reasoning_effort=effort)
        assert text.endswith("assistant\n") == thinks
        refused = await app.post(
            CHAT,
            {
                "messages": [USER],
                "reasoning_effort": effort,
                "chat_template_kwargs": {"enable_thinking": not thinks},
            },
        )
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "reasoning_effort"


async def test_a_model_that_knows_no_effort_takes_none_alone(open_app: OpenApp, tokenizer: Tokenizer) -> None:
    async with open_app(saying(tokenizer, "Hi"), max_tools=2) as app:
        for effort, status in (("none", 200), ("high", 400)):
            answer = await app.post(CHAT, {"messages": [USER], "max_tokens": 1, "reasoning_effort": effort})
            assert answer.status_code == status


async def test_where_the_template_knows_no_tools_the_system_is_told_of_them(
    open_app: OpenApp, model_info: ModelInfo, tokenizer: Tokenizer
) -> None:
    info = msgspec.structs.replace(model_info, max_model_len=1000)
    called = '```json\n{"name": "find", "arguments": {"city": "Bern"}}\n```'
    system = {"role": "system", "content": "Be brief."}
    async with open_app(saying(tokenizer, called), info=info) as app:
        text = await prompt_of(
            app, messages=[system, USER], tools=[tool(description="d")], tool_choice="required"
        )
        assert '"description":"d"' in text
        assert text.count("<|im_start|>system") == 1
        assert text.index('"find"') < text.index("Be brief.") < text.index("Hi")
        told = await ask(app, tools=[tool()], tool_choice="required")
        assert told["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "find"
        without = await prompt_of(app, messages=[system, USER])
        assert await prompt_of(app, messages=[system, USER], tools=[tool()], tool_choice="none") == without
