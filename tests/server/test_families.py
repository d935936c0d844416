# ruff: noqa: RUF001 - DeepSeek's tokens have a fullwidth vertical line
"""Families of models: how they are told, and files and templates that declare them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from logitserve.text.families.choose import choose_family, family_names, load_family
from logitserve.text.parser import Content, Reasoning, TextPart, ToolCall
from logitserve.text.tools import Tool
from model_outputs import TOOLS, joined

QWEN = '<tools>…<tool_call>\n{{"name": …, "arguments": …}}\n</tool_call>'

SMOLLM3: dict[str, Any] = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "thinking": {"open": "<think>", "close": "</think>"},
        "tool_calls": {
            "open": "<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close": "<|im_end|>"},
    },
}
"""A response_template in the manner of those that tokenizers bring."""

WITH_PARAMETERS: dict[str, Any] = {
    "start_anchor": "<turn>",
    "fields": {
        "tool_calls": {
            "open_pattern": r"<call:(?P<name>\w+)>",
            "close": "</call>",
            "content": "xml-inline",
            "content_args": {"tag_pattern": r"<(?P<key>\w+)>(?P<value>.*?)</\w+>"},
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {},
    },
}
"""One whose calls are no JSON."""


def read(template: dict[str, Any], text: str, prompt: str = "") -> list[TextPart]:
    """Return the parts of a text, which are the same in characters."""
    family = choose_family(None, template, "", None)
    assert family is not None
    found = []
    for pieces in ([text], list(text)):
        parser = family.parser(prompt, tools=TOOLS, parses_calls=True)
        parts = [part for piece in pieces for part in parser.push(piece)]
        found.append(joined([*parts, *parser.finish()]))
    assert found[0] == found[1]
    return found[0]


@pytest.mark.parametrize(
    ("template", "architecture", "name"),
    [
        (QWEN, "Qwen2ForCausalLM", "hermes"),
        ("<tool_call>\n<function=f>\n<parameter=a>\n … arguments … </tool_call>", "", "qwen3_5"),
        (
            "<tool_call>{{ call.name }}{% for k in call.arguments %}<arg_key>…<arg_value>…</tool_call>",
            "",
            "glm4_5",
        ),
        ('<|start_header_id|>ipython<|end_header_id|> {"name": …, "parameters": …}', "", "llama3"),
        ("[TOOL_CALLS] [", "", "mistral"),
        ("[TOOL_CALLS]f[ARGS]", "", "mistral_named"),
        ("<start_function_call>call:f{a:<escape>", "", "functiongemma"),
        ('<|tool_call>call:f{a:<|"|>', "", "gemma4"),
        ("<|channel|>commentary<|message|>", "", "harmony"),
        (None, "GptOssForCausalLM", "harmony"),
        ("<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json", "", "deepseek"),
        ("<｜tool▁call▁begin｜>f<｜tool▁sep｜>", "", "deepseek_v3_1"),
    ],
)
def test_a_family_is_told_by_its_chat_template_or_architecture(
    template: str | None, architecture: str, name: str
) -> None:
    family = choose_family(template, None, architecture, None)
    assert family is not None
    assert family.name == name


@pytest.mark.parametrize("template", [None, "{{ messages[0].content }}"])
def test_a_model_of_no_family_has_none(template: str | None) -> None:
    assert choose_family(template, None, "LlamaForCausalLM", None) is None


def test_an_option_names_the_family_or_its_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text('{"name": "mine", "reasoning": {"open": "<t>", "close": "</t>"}}')
    for option, name in (("fenced", "fenced"), (str(path), "mine")):
        family = choose_family(QWEN, SMOLLM3, "", option)
        assert family is not None
        assert (family.name, family.response_template) == (name, None)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "{}",
        '{"name": "x", "thinking": {}}',
        '{"name": "x", "calls": {"form": "yaml", "open": "", "close": ""}}',
        '{"name": "x", "content": {"open_pattern": "("}}',
    ],
)
def test_a_file_that_declares_no_family_is_refused_with_its_name(text: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"mine\.json"):
        load_family(str(path))


def test_an_unknown_family_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ValueError, match=r"hermes, .*qwen3_5"):
        load_family("nothing")


def test_a_tokenizers_own_template_is_read_first_and_the_family_says_how_calls_are_written() -> None:
    family = choose_family(QWEN, SMOLLM3, "", None)
    assert family is not None
    assert family.response_template == SMOLLM3
    assert family.reads_calls
    assert family.reads_reasoning
    assert family.calls == load_family("hermes").calls


def test_a_tokenizers_own_template_cuts_answers_into_parts() -> None:
    call = '<tool_call>{"name": "f", "arguments": {"a": [1, "é"]}}</tool_call>'
    whole = [Reasoning("Hm."), Content("So:"), ToolCall(0, "", "f", '{"a": [1, "é"]}')]
    assert read(SMOLLM3, f"<think>Hm.</think>\nSo:\n{call}") == whole
    prompt = "<|im_start|>user\n<tool_call><|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert read(SMOLLM3, f"Hm.</think>\nSo:\n{call}", prompt) == whole
    assert read(SMOLLM3, f"So:\n{call[:-14]}") == [Content(f"So:\n{call[:-14]}")]
    assert read(SMOLLM3, "<tool_call>[1]</tool_call>") == [Content("<tool_call>[1]</tool_call>")]


def test_a_tokenizers_own_template_may_take_calls_that_are_no_json() -> None:
    text = "<call:plan><days>3</days><note>4</note></call>"
    assert read(WITH_PARAMETERS, text) == [ToolCall(0, "", "plan", '{"days": 3, "note": "4"}')]
    assert read(WITH_PARAMETERS, text[:-7]) == [Content(text[:-7])]


@pytest.mark.parametrize(
    "template",
    [{}, {"fields": {"content": {}}}, {"start_anchor": "a", "fields": {"x": {"open_pattern": "("}}}],
)
def test_a_template_of_the_tokenizer_that_transformers_refuses_is_refused(template: dict[str, Any]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the library's own message
        choose_family(QWEN, template, "", None)


@pytest.mark.parametrize(
    ("name", "prompt", "text", "thinking"),
    [
        ("hermes", "", "<think>a</think>b", "<think>a</think>"),
        ("hermes", "<|im_start|>assistant\n<think>\n", "a</think>b", "a</think>"),
        (
            "harmony",
            "<|start|>assistant",
            "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b",
            "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>",
        ),
    ],
)
def test_stop_strings_wait_for_the_end_of_the_thinking(
    name: str, prompt: str, text: str, thinking: str
) -> None:
    gate = load_family(name).thinking_gate(prompt)
    assert gate is not None
    assert gate.split(text) == (thinking, "b")


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("fenced", ""),
        ("hermes", "<|im_start|>assistant\n<think>\n\n</think>\n\n"),
        ("hermes", "<|im_start|>assistant\nThe answer"),
    ],
)
def test_stop_strings_wait_for_nothing_where_no_thinking_can_come(name: str, prompt: str) -> None:
    assert load_family(name).thinking_gate(prompt) is None


def test_every_familys_file_says_its_name() -> None:
    assert [load_family(name).name for name in family_names()] == family_names()


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        ("harmony", ["<|channel|>commentary to=functions.f" + " " * 1900 + "{"]),
        ("harmony", ["<|channel|>final", *([" "] * 2000)]),
        ("hermes", ["<tool_call>", *([" " * 10] * 600)]),
        ("mistral", ["[TOOL_CALLS]", *([" " * 10] * 600)]),
        ("qwen3_5", ["<tool_call>\n" + "<function=a>" * 4000 + "\n</tool_call>"]),
        ("qwen3_5", ["<tool_call>\n<function=a>" + "<parameter=a>" * 4000 + "</function>\n</tool_call>"]),
    ],
)
def test_what_models_write_without_end_is_no_call_and_is_read_before_the_test_times_out(
    name: str, pieces: list[str]
) -> None:
    parser = load_family(name).parser("", tools=(), parses_calls=True)
    for piece in pieces:
        parser.push(piece)
    parser.finish()
    assert not parser.has_calls


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        (
            "mistral",
            '[INST]Hi[/INST][TOOL_CALLS][{}]</s>[TOOL_RESULTS]{"content": "a [THINK] b"}[/TOOL_RESULTS]',
        ),
        (
            "gemma4",
            "<|turn>model\n<|tool_call>call:f{}<tool_call|><|tool_response>response:f{a:<|channel>thought\n}<tool_response|>",
        ),
    ],
)
def test_a_tools_result_opens_no_thinking(name: str, prompt: str) -> None:
    parser = load_family(name).parser(prompt, tools=(), parses_calls=True)
    assert not parser.in_reasoning
    assert parser.push("It is sunny.") == [Content("It is sunny.")]


@pytest.mark.parametrize(
    ("schema", "written", "value"),
    [
        ({"$ref": "#/$defs/P"}, '{"x": 1}', {"x": 1}),
        ({"const": 5}, "5", 5),
        ({"const": "5"}, "5", "5"),
        ({"type": ["string", "null"], "enum": ["a", None]}, '"a"', "a"),
        ({"enum": ["1", "2"]}, "1", "1"),
        ({"type": "string"}, "1", "1"),
        ({"type": "boolean"}, "True", True),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "null", "null"),
        ({"enum": 5}, "1", 1),
        ({"type": 5, "anyOf": None}, "1", 1),
    ],
)
def test_a_parameters_text_is_what_its_schema_says(schema: dict[str, Any], written: str, value: Any) -> None:
    tool = Tool("f", parameters={"type": "object", "properties": {"a": schema}})
    parser = load_family("qwen3_5").parser("", tools=[tool], parses_calls=True)
    element = f"<tool_call>\n<function=f>\n<parameter=a>\n{written}\n</parameter>\n</function>\n</tool_call>"
    (call,) = [*parser.push(element), *parser.finish()]
    assert isinstance(call, ToolCall)
    assert json.loads(call.arguments) == {"a": value}


def test_a_strict_tools_call_is_taken_only_as_its_grammar_writes_it() -> None:
    fence = '```json\n{"name": "f", "arguments": {"zzz": "x"}}\n```'
    for strict, kind in ((True, Content), (False, ToolCall)):
        parser = load_family("hermes").parser("", tools=[Tool("f", strict=strict)], parses_calls=True)
        (part,) = [*parser.push(fence), *parser.finish()]
        assert isinstance(part, kind)


def test_white_space_at_a_cut_is_what_it_follows() -> None:
    parser = load_family("hermes").parser("", tools=(), parses_calls=False)
    parts = [*parser.push("<think>\nab\n\n"), *parser.finish()]
    assert "".join(part.text for part in parts if isinstance(part, Reasoning)) == "ab\n\n"
    assert not any(isinstance(part, Content) for part in parts)
