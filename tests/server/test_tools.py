"""Tools of a chat, over a scripted engine: what becomes the prompt and the grammar, and how calls are answered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer
from logitengine.link.messages import (
    Array,
    GenerationRequest,
    LogitsRows,
    Logprobs,
    ModelInfo,
    StepOutput,
)
from scripted_engine import App, OpenApp, Script, Step
from tokenizers import AddedToken, Tokenizer

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "Hi"}

TEMPLATE = """\
{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif -%}
{%- for message in messages %}<|im_start|>{{ message.role }}{% if message.name %} {{ message.name }}{% endif %}
{{- '\n' + message.content }}
{%- for call in message.tool_calls %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}


def tool(name: str = "find", **members: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **members}}


@pytest.fixture(scope="module")
def thinking_model(tmp_path_factory: pytest.TempPathFactory, model_info: ModelInfo) -> ModelInfo:
    """A model that thinks and calls as Qwen 3 does, with SmolLM2's tokenizer and tokens of its own for both."""
    directory = tmp_path_factory.mktemp("thinking")
    source = Path(model_info.tokenizer_path)
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    names = ("<think>", "</think>", "<tool_call>", "</tool_call>")
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in names])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings["chat_template"] = TEMPLATE
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return msgspec.structs.replace(
        model_info,
        tokenizer_path=str(directory),
        vocab_size=tokenizer.get_vocab_size(),
        max_model_len=4096,
    )


@pytest.fixture(scope="module")
def tokenizer(thinking_model: ModelInfo) -> Tokenizer:
    return Tokenizer.from_file(str(Path(thinking_model.tokenizer_path) / "tokenizer.json"))


def saying(tokenizer: Tokenizer, text: str, *, with_rows: bool = False) -> Script:
    """Return a script that says a text, a token a step, with a row of four columns for each token if asked."""
    ids = ids_of(tokenizer, text)

    def script(request: GenerationRequest) -> list[Step]:
        return [
            StepOutput(
                request_id=request.request_id,
                index=0,
                token_ids=[token_id],
                finish_reason="stop" if position == len(ids) - 1 else None,
                logits=row(position) if with_rows else None,
                logprobs=logprob(token_id, position) if with_rows else None,
            )
            for position, token_id in enumerate(ids)
        ]

    return script


def row(position: int) -> LogitsRows:
    values = np.arange(4, dtype="<f4") + position
    columns = np.arange(4, dtype="<i4")
    return LogitsRows(
        values=Array("float32", (1, 4), values.tobytes()), token_ids=Array("int32", (1, 4), columns.tobytes())
    )


def logprob(token_id: int, position: int) -> Logprobs:
    return Logprobs(
        token_logprobs=[-position / 8], ranks=[0], top_ids=[[token_id]], top_logprobs=[[-position / 8]]
    )


async def ask(app: App, **body: Any) -> dict[str, Any]:
    answer = await app.post(CHAT, {"messages": [USER], "max_tokens": 500, **body})
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


async def stream(app: App, **body: Any) -> list[Any]:
    answer = await app.post(CHAT, {"messages": [USER], "max_tokens": 500, "stream": True, **body})
    assert answer.status_code == 200, answer.text
    return [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]


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
OUTPUTS = {
    "text": "Hello there.",
    "thinking": "<think>\nHm, no.\n</think>\n\nHello.",
    "calls": CALLS,
    "all": f"<think>\nTwo.\n</think>\n\nLet me see.\n{CALLS}",
    "malformed": '<tool_call>\n{"name": "find", "arguments": }\n</tool_call> so',
    "cut": '<think>\nHm</think>Well <tool_call>\n{"name": "find", "argum',
}


@pytest.mark.parametrize("name", OUTPUTS)
async def test_a_stream_says_what_the_whole_answer_says_with_every_row_once(
    open_app: OpenApp, thinking_model: ModelInfo, tokenizer: Tokenizer, name: str
) -> None:
    """Rows, log-probabilities and ids are those of the engine's outputs, in order, whatever the parser holds back."""
    text = OUTPUTS[name]
    ids = ids_of(tokenizer, text)
    wants: dict[str, Any] = {
        "tools": [tool(parameters=CITY)],
        "return_logits": {"top_k": 4},
        "logprobs": True,
        "top_logprobs": 1,
    }
    async with open_app(saying(tokenizer, text, with_rows=True), info=thinking_model) as app:
        whole = await ask(app, **wants)
        events = await stream(app, **wants)
        plain = await ask(app, **wants, tool_choice="none")
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
    has_calls = name in ("calls", "all")
    assert choice["finish_reason"] == ("tool_calls" if has_calls else "stop")
    assert (choice["message"]["content"] is None) == (name == "calls")
    assert len(choice["message"].get("tool_calls", [])) == (2 if has_calls else 0)
    assert plain_choice["message"].get("tool_calls") is None


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


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def at_once(ids: list[int]) -> Script:
    """Return a script that says all tokens in one step."""
    return lambda request: [
        StepOutput(request_id=request.request_id, index=0, token_ids=ids, finish_reason="stop")
    ]


# Prompts.


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


# Grammars.


async def grammar_of(app: App, **body: Any) -> str | None:
    await ask(app, **body)
    return app.engine.requests.pop().grammar


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


FIND = '<tool_call>\n{"name": "find", "arguments": {"city": "Bern"}}\n</tool_call>'
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


# Refusals.


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
