"""Chats with tools that cannot be honoured, and those that ask for nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from logitengine.link.messages import ModelInfo
from scripted_engine import OpenApp
from tokenizers import Tokenizer
from tool_chats import (
    CHAT,
    FIND,
    USER,
    grammar_of,
    saying,
    tool,
)

pytestmark = pytest.mark.anyio


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def called(arguments: str = "{}", **members: Any) -> dict[str, Any]:
    return {"id": "c", "type": "function", "function": {"name": "find", "arguments": arguments}, **members}


FIRST = "tools[0].function"
REQUIRED = {"tool_choice": "required"}

REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"tools": "yes"}, "tools", "list"),
    ({"tools": [{"type": "function"}]}, FIRST, "Missing"),
    ({"tools": [{"type": "custom", "custom": {"name": "a"}}]}, "tools[0].type", "function"),
    ({"tools": [tool("")]}, f"{FIRST}.name", "1 to 64"),
    ({"tools": [tool("a b")]}, f"{FIRST}.name", "1 to 64"),
    ({"tools": [tool("a" * 10_000)]}, f"{FIRST}.name", "10000 characters"),
    ({"tools": [tool(parameters={"type": "string"})]}, f"{FIRST}.parameters", '"object"'),
    ({"tools": [tool(parameters=nested(60))]}, f"{FIRST}.parameters", "100 deep"),
    ({"tools": [tool(colour="red")]}, f"{FIRST}.colour", "Unknown"),
    ({"tools": [tool(), tool()]}, "tools[1].function.name", "another tool"),
    ({"tools": [tool(f"f{i}") for i in range(1000)]}, "tools", "--max-tools"),
    ({"tools": [tool(description="a" * 2_000_000)]}, "tools", "--max-model-len"),
    (REQUIRED, "tool_choice", "no 'tools'"),
    ({**REQUIRED, "tools": []}, "tool_choice", "no 'tools'"),
    ({"tools": [tool()], "tool_choice": "any"}, "tool_choice", '"required"'),
    ({"tools": [tool()], "tool_choice": {"type": "allowed_tools"}}, "tool_choice", "not supported"),
    (
        {"tools": [tool()], "tool_choice": {"type": "function", "function": {"name": "seek"}}},
        "tool_choice.function.name",
        "does not list",
    ),
    ({"functions": [{"name": "a"}]}, "functions", "not supported"),
    ({"function_call": {"name": "a"}}, "function_call", "not supported"),
    ({"reasoning_effort": "huge"}, "reasoning_effort", "'none'"),
    ({**REQUIRED, "tools": [tool(parameters={"not": {}})]}, "tools", "parameters of find"),
    ({**REQUIRED, "tools": [tool(parameters={"$ref": "#"})]}, "tools", "parameters of find"),
    ({"tools": [tool(parameters={"not": {}}, strict=True)]}, "tools", "parameters of find"),
    ({**REQUIRED, "tools": [tool(parameters={"title": "a b" * 1000})]}, "tools", "--max-grammar-bytes"),
    (
        {"messages": [USER, {"role": "user", "content": "x", "tool_calls": [called()]}]},
        "messages[1].tool_calls",
        "assistants",
    ),
    (
        {"messages": [USER, {"role": "assistant", "tool_calls": [called('{"a":' * 200 + "1" + "}" * 200)]}]},
        "messages[1].tool_calls[0].function.arguments",
        "100 deep",
    ),
    (
        {"messages": [USER, {"role": "assistant", "tool_calls": [{}]}]},
        "messages[1].tool_calls[0].id",
        "Missing",
    ),
]
"""Fields of a body, the field that the refusal names, and a part of its message."""


async def test_what_cannot_be_honoured_is_refused_by_name(
    open_app: OpenApp, thinking_model: ModelInfo, tokenizer: Tokenizer
) -> None:
    async with open_app(saying(tokenizer, "Hi"), info=thinking_model, max_grammar_bytes=2000) as app:
        for fields, param, part in REFUSED:
            answer = await app.post(CHAT, {"messages": [USER], "max_tokens": 1, **fields})
            assert answer.status_code == 400, (str(fields)[:200], answer.text)
            error = answer.json()["error"]
            assert error["param"] == param, error
            assert part in error["message"], error
        assert app.engine.requests == []


async def test_fields_that_ask_for_no_call_may_be_sent_without_tools(
    open_app: OpenApp, tokenizer: Tokenizer
) -> None:
    async with open_app(saying(tokenizer, "Hi")) as app:
        for fields in (
            {"tools": [], "tool_choice": "auto"},
            {"tool_choice": "none", "parallel_tool_calls": True},
            {"functions": [], "function_call": "auto"},
        ):
            assert await grammar_of(app, **fields, max_tokens=1) is None


async def test_a_template_that_raises_is_a_refusal(
    open_app: OpenApp, thinking_model: ModelInfo, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    source = Path(thinking_model.tokenizer_path)
    (tmp_path / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    template = "{% if tools %}{{ raise_exception('No tools after ' + messages[0].content) }}{% endif %}Hi <tool_call>"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    info = msgspec.structs.replace(thinking_model, tokenizer_path=str(tmp_path))
    async with open_app(saying(tokenizer, "Hi"), info=info, tool_template="hermes") as app:
        answer = await app.post(CHAT, {"messages": [USER], "tools": [tool()]})
    assert answer.status_code == 400
    assert "No tools after Hi" in answer.json()["error"]["message"]


async def test_a_model_whose_calls_nobody_knows_needs_the_option(
    open_app: OpenApp, thinking_model: ModelInfo, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    source = Path(thinking_model.tokenizer_path)
    (tmp_path / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    settings = {"chat_template": "{{ tools | tojson }}{{ messages[0].content }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    info = msgspec.structs.replace(thinking_model, tokenizer_path=str(tmp_path))
    for options, status in (({}, 400), ({"tool_template": "hermes"}, 200)):
        async with open_app(saying(tokenizer, FIND), info=info, **options) as app:
            answer = await app.post(CHAT, {"messages": [USER], "max_tokens": 9, "tools": [tool()]})
        assert answer.status_code == status
        if status == 400:
            assert "--tool-template" in answer.json()["error"]["message"]
        else:
            assert answer.json()["choices"][0]["message"]["tool_calls"]
