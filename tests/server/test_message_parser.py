"""Outputs of models as messages: streamed and whole, cut anywhere, malformed or not."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from logitengine.model.checkpoint.resolve import Checkpoint
from logitserve.text.families.choose import family_names
from logitserve.text.parser import Content, Reasoning
from logitserve.text.tools import Tool
from model_outputs import OUTPUTS, TOOLS, WRITINGS, ModelOutput, calls_in, family_of, joined, texts
from tokenizers import Tokenizer

BY_FAMILY = pytest.mark.parametrize("family", family_names())

WRITES_NO_JSON = {"qwen3_5", "functiongemma", "gemma4"}


@pytest.fixture(scope="module")
def tokenizer(smollm2: Checkpoint) -> Tokenizer:
    return Tokenizer.from_file(str(smollm2.tokenizer_path / "tokenizer.json"))


def outputs_of(family: str) -> list[ModelOutput]:
    return [output for output in OUTPUTS if output.family == family]


def test_the_table_has_outputs_of_every_family() -> None:
    assert len(OUTPUTS) >= 60
    assert {output.family for output in OUTPUTS} == set(family_names())


@BY_FAMILY
def test_an_output_is_the_message_that_its_model_meant(family: str) -> None:
    for output in outputs_of(family):
        parts = output.parts()
        assert texts(parts, Reasoning) == output.reasoning, output.name
        assert texts(parts, Content) == output.content, output.name
        found = [(call.name, call.arguments) for call in calls_in(parts)]
        if family not in WRITES_NO_JSON:
            assert found == list(output.calls), output.name
        assert [(name, json.loads(text)) for name, text in found] == [
            (name, json.loads(text)) for name, text in output.calls
        ], output.name
        assert [call.index for call in calls_in(parts)] == list(range(len(found)))


@BY_FAMILY
def test_an_output_in_characters_is_the_message_of_the_whole(family: str) -> None:
    for output in outputs_of(family):
        assert output.parts(output.text) == output.parts(), output.name


@BY_FAMILY
def test_an_output_that_is_cut_behind_any_token_is_a_message(family: str, tokenizer: Tokenizer) -> None:
    """Calls are whole whenever there are any, and nothing is lost where there are none."""
    for output in outputs_of(family):
        ends = sorted({end for _, end in tokenizer.encode(output.text).offsets})
        pieces = [output.text[start:end] for start, end in itertools.pairwise([0, *ends])]
        assert "".join(pieces) == output.text
        for count in range(len(pieces)):
            cut = replace(output, text="".join(pieces[:count]))
            parts = cut.parts()
            assert cut.parts(pieces[:count]) == parts, cut.text
            assert all(isinstance(json.loads(call.arguments), dict) for call in calls_in(parts)), cut.text
            # What is dropped stands at borders of the thinking, of calls and of harmony's messages.
            if not output.reasoning and family != "harmony" and not calls_in(parts):
                assert texts(parts, Content) == cut.text


FRAGMENTS = [
    *["{", "}", '"', "\\", "[", "]", ",", ":", "; ", "\n", " ", "x", "é", "<", "`", "get_weather", "call:f{"],
    *[
        '{"name": "get_weather", "arguments": ',
        '{"name": "get_weather", "parameters": {}}',
        '{"city": "Paris"}',
    ],
    *["<function=f>", "<parameter=a>", "</parameter>", "</function>", "analysis", "final", "commentary"],
]


@st.composite
def written_in_pieces(draw: st.DrawFn) -> tuple[ModelOutput, list[str]]:
    """Text of a family's delimiters and parts of calls, in any order, and pieces of it."""
    name = draw(st.sampled_from(family_names()))
    family = family_of(name)
    opens = [family.calls.open, family.calls.close, family.calls.middle] if family.calls else []
    strings = [text for text in (*family.delimiters, *opens) if text]
    call = ("get_weather", '{"city": "Paris"}')
    whole = [WRITINGS[name].calls(call)] if name in WRITINGS else []
    text = "".join(draw(st.lists(st.sampled_from([*strings, *strings, *FRAGMENTS, *whole]), max_size=12)))
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    prompt = draw(st.sampled_from(["", family.reasoning.open if family.reasoning else ""]))
    return ModelOutput("", name, text, prompt=prompt), pieces


@given(written=written_in_pieces())
def test_parts_do_not_depend_on_how_the_text_was_cut(written: tuple[ModelOutput, list[str]]) -> None:
    output, pieces = written
    parts = output.parts()
    assert output.parts(pieces) == parts
    assert output.parts(output.text) == parts
    for call in calls_in(parts):
        assert isinstance(json.loads(call.arguments), dict)


def test_a_call_comes_as_soon_as_it_is_whole() -> None:
    parser = family_of("hermes").parser("", tools=TOOLS, parses_calls=True)
    text = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    assert not [part for character in text[:-1] for part in parser.push(character)]
    assert not parser.has_calls
    (call,) = calls_in(parser.push(text[-1]))
    assert bool(parser.has_calls)
    assert call.id.startswith("call_")
    assert len(call.id) == len("call_") + 24


@pytest.mark.parametrize(
    "text",
    [
        "```json\n[1",
        '```json\n{"users": [',
        '```json\n{"name": "Ann", ',
        '```json\n{"name": "get_weather"} x',
    ],
)
def test_what_certainly_is_no_call_is_not_held_back(text: str) -> None:
    parser = family_of("fenced").parser("", tools=TOOLS, parses_calls=True)
    assert texts([*parser.push(text), *parser.push("more")], Content) == text + "more"


def test_calls_are_text_where_they_are_not_parsed() -> None:
    text = WRITINGS["hermes"].calls(("get_weather", "{}"))
    parser = family_of("hermes").parser("", tools=TOOLS, parses_calls=False)
    assert joined([*parser.push("<think>Hm.</think>" + text), *parser.finish()]) == [
        Reasoning("Hm."),
        Content(text),
    ]
    assert not parser.has_calls


def test_thinking_is_told_as_long_as_it_lasts() -> None:
    parser = family_of("hermes").parser("", tools=(), parses_calls=False)
    told = []
    for piece in ["<think>", "Hm", "</", "think>", "Hi"]:
        parser.push(piece)
        told.append(parser.in_reasoning)
    assert told == [True, True, True, False, False]


def test_hidden_tokens_are_no_content_wherever_the_text_is_cut() -> None:
    text = "[TOOL_CALLS] no call[ARGS], [TOOL_CALLS]f[ARGS]{bad} [INST"
    hidden = frozenset(["[TOOL_CALLS]", "[ARGS]"])
    found = []
    for pieces in ([text], list(text)):
        parser = family_of("mistral_named").parser("", tools=TOOLS, parses_calls=True, hidden=hidden)
        parts = [part for piece in pieces for part in parser.push(piece)]
        found.append(joined([*parts, *parser.finish()]))
    assert found[0] == found[1] == [Content(" no call, f{bad} [INST")]


def test_ids_of_mistral_are_nine_letters_and_digits() -> None:
    parser = family_of("mistral").parser("", tools=TOOLS, parses_calls=True)
    (call,) = calls_in(parser.push('[TOOL_CALLS] [{"name": "f", "arguments": {}}]'))
    assert len(call.id) == 9
    assert call.id.isalnum()


@pytest.mark.parametrize(
    "opening", ["", "<think>", '<tool_call>{"name": "f", "arguments": {"a": "', "```json\n[1]"]
)
def test_the_library_never_holds_a_long_answer(opening: str) -> None:
    """It copies what it holds with each piece, so that 100,000 tokens would take minutes."""
    parser = family_of("hermes").parser("", tools=TOOLS, parses_calls=True)
    parser.push(opening)
    longest = 0
    for _ in range(2000):
        parser.push("a < b `c` ")
        longest = max(longest, len(parser._regions._parser._buffer))
    assert longest < 5000


def test_arguments_of_xml_are_typed_by_the_tools_schema() -> None:
    schema = {
        "properties": {
            "text": {"type": "string"},
            "count": {"type": ["integer", "null"]},
            "any": {"anyOf": [{"type": "number"}, {"type": "string"}]},
            "flag": {"type": "boolean"},
        }
    }
    values = {"text": "12", "count": "12", "any": "3", "flag": "True", "other": "[1]"}
    body = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    parser = family_of("qwen3_5").parser("", tools=[Tool("f", "", schema)], parses_calls=True)
    (call,) = calls_in(parser.push(f"<tool_call>\n<function=f>\n{body}</function>\n</tool_call>"))
    assert json.loads(call.arguments) == {"text": "12", "count": 12, "any": "3", "flag": True, "other": "[1]"}
