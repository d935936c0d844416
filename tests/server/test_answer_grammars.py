"""Grammars of calls in every family's form, with the tokens that the model itself would write."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from llguidance import LLMatcher, LLTokenizer
from logitengine.grammar.vocabulary import GrammarError
from logitengine.link.messages import ModelInfo
from logitserve.errors import BadRequestError
from logitserve.grammars.source import GrammarSource
from logitserve.grammars.translation import translate
from logitserve.jobs.calls import CallOptions, answer_source
from logitserve.jobs.prompts import TokenizedPrompt
from logitserve.state import Model
from logitserve.text.families.choose import family_names, load_family
from logitserve.text.tokenizer import ModelTokenizer
from logitserve.text.tools import Tool
from model_outputs import WRITINGS
from scripted_engine import ScriptedEngine
from tokenizers import AddedToken, Tokenizer

CONTROL = re.compile(r"<[^<>\n]+>|\[/?[A-Z_]+\]")
"""Tokens of their own within a family's delimiters."""

PLAN = {
    "type": "object",
    "properties": {
        "days": {"type": "integer"},
        "mode": {"enum": ["slow", "fast"]},
        "note": {"type": "string"},
        "options": {"type": "object"},
        "stops": {"type": "array", "items": {"type": "object"}},
    },
    "required": ["days", "note"],
}
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
STRICT = (Tool("get_weather", parameters=CITY, strict=True), Tool("plan", parameters=PLAN, strict=True))
LOOSE = tuple(replace(tool, strict=False) for tool in STRICT)
REQUIRED = CallOptions(STRICT, must_call=True, may_call=True)
AUTO = CallOptions(STRICT, may_call=True)

WEATHER_CALL = ("get_weather", '{"city": "São <b>"}')
PLAN_CALL = (
    "plan",
    '{"days": 3, "mode": "slow", "note": "a, b: {c}", "options": {"deep": {"er": null}}, "stops": [{"at": [1, true]}, {}]}',
)
SHORT_CALL = ("plan", '{"days": 3, "note": ""}')
WRONG_CALL = ("plan", '{"days": "x", "note": ""}')
UNKNOWN_CALL = ("seek", "{}")


@dataclass(frozen=True)
class Writer:
    """SmolLM2's tokenizer with the control tokens of all families, and a model that has it."""

    model: Model
    tokenizer: Tokenizer
    grammar_tokenizer: LLTokenizer

    def grammar(
        self, family: str, calls: CallOptions, format_: GrammarSource | None = None, prompt: str = ""
    ) -> str:
        source = answer_source(format_, calls, load_family(family), TokenizedPrompt([1], prompt), self.model)
        assert source is not None
        return translate(source.kind, source.text)

    def may_write(self, grammar: str, text: str) -> bool:
        """Return whether the model may write the text with its own tokens, and end there."""
        matcher = LLMatcher(self.grammar_tokenizer, grammar)
        assert not matcher.is_error(), matcher.get_error()
        for token_id in self.tokenizer.encode(text, add_special_tokens=False).ids:
            if not matcher.compute_bitmask()[token_id // 8] >> token_id % 8 & 1:
                return False
            assert matcher.consume_token(token_id)
        return matcher.is_accepting()


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory, model_info: ModelInfo) -> Writer:
    directory = tmp_path_factory.mktemp("writer")
    tokenizer = Tokenizer.from_file(str(Path(model_info.tokenizer_path) / "tokenizer.json"))
    delimiters = [text for name in family_names() for text in load_family(name).delimiters]
    names = {name for text in delimiters for name in CONTROL.findall(text)}
    # Qwen's are not special, and neither are DeepSeek's.
    for name in sorted(names):
        is_special = name.startswith(("<|", "["))
        tokenizer.add_tokens([AddedToken(name, special=is_special, normalized=False)])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": "<think>"}))
    ends = [2, tokenizer.token_to_id("<|call|>") or 0]
    info = msgspec.structs.replace(
        model_info, tokenizer_path=str(directory), vocab_size=tokenizer.get_vocab_size(), eos_token_ids=ends
    )
    model = Model(ScriptedEngine(info, lambda _: []), ModelTokenizer(directory), ["writer"])
    return Writer(model, tokenizer, LLTokenizer(tokenizer.to_str(), eos_token=ends))


def written(family: str, *calls: tuple[str, str]) -> str:
    """Return the calls as the family writes them; harmony's end is the answer's, which is no part of its text."""
    text = WRITINGS[family].calls(*calls)
    return text.removesuffix("<|call|>")


@pytest.mark.parametrize("family", WRITINGS)
def test_calls_that_must_come_are_written_as_the_family_writes_them(writer: Writer, family: str) -> None:
    grammar = writer.grammar(family, REQUIRED)
    for call in (WEATHER_CALL, PLAN_CALL, SHORT_CALL):
        assert writer.may_write(grammar, written(family, call)), call
    for call in (WRONG_CALL, UNKNOWN_CALL):
        assert not writer.may_write(grammar, written(family, call)), call
    two = written(family, WEATHER_CALL, PLAN_CALL)
    assert writer.may_write(grammar, two) == (family != "harmony")  # its calls each end an answer
    assert not writer.may_write(writer.grammar(family, replace(REQUIRED, parallel=False)), two)
    named = writer.grammar(family, replace(REQUIRED, named="plan"))
    assert writer.may_write(named, written(family, SHORT_CALL))
    assert not writer.may_write(named, written(family, WEATHER_CALL))
    for text in ("", "Hi", f"Hi {written(family, WEATHER_CALL)}"):
        assert not writer.may_write(grammar, text), text
    thinking = WRITINGS[family].thinking
    if thinking is not None:
        before, after = thinking
        assert writer.may_write(grammar, f"{before}Hm, {{no}} <b>\n.{after}{written(family, WEATHER_CALL)}")
        assert not writer.may_write(grammar, f"{before}Hm.{after}Hi")


@pytest.mark.parametrize("family", WRITINGS)
def test_calls_that_may_come_follow_their_schema_where_they_come(writer: Writer, family: str) -> None:
    strict = writer.grammar(family, AUTO)
    before, after = WRITINGS[family].answer
    text = "It rains, [as] <usual> ``` so.\n"
    assert writer.may_write(strict, before + text + after.removesuffix("<|end|>"))
    assert writer.may_write(strict, written(family, PLAN_CALL))
    for call in (WRONG_CALL, UNKNOWN_CALL):
        assert not writer.may_write(strict, written(family, call)), call
    if family not in ("llama3", "harmony"):  # there a call opens the answer
        assert writer.may_write(strict, f"Let me see.\n{written(family, WEATHER_CALL)} So.")
        assert not writer.may_write(strict, f"Let me see.\n{written(family, WRONG_CALL)}")
    # One of the two tools is strict: the other's arguments are any object.
    mixed = writer.grammar(family, replace(AUTO, tools=(STRICT[0], LOOSE[1])))
    assert writer.may_write(mixed, written(family, WRONG_CALL))
    assert not writer.may_write(mixed, written(family, ("get_weather", "{}")))


@pytest.mark.parametrize("family", [name for name, writing in WRITINGS.items() if writing.thinking])
def test_a_form_begins_after_the_thinking(writer: Writer, family: str) -> None:
    form = GrammarSource("json_schema", json.dumps(CITY), "response_format")
    (opening, closing), (before, _) = WRITINGS[family].thinking or ("", ""), WRITINGS[family].answer
    good, bad = before + '{"city": "Bern"}', before + '{"town": "Bern"}'
    grammar = writer.grammar(family, CallOptions(), form)
    either = writer.grammar(family, CallOptions(LOOSE, may_call=True), form)
    for thinking in ("", f"{opening}Hm.\n{closing}"):
        assert writer.may_write(grammar, thinking + good)
        assert not writer.may_write(grammar, thinking + bad)
        assert writer.may_write(either, thinking + good)
        assert writer.may_write(either, thinking + written(family, WEATHER_CALL))
        assert not writer.may_write(either, f"{thinking}Hi")
    if family != "harmony":  # its template opens no thinking
        opened = writer.grammar(family, CallOptions(), form, prompt=load_family(family).turn[0] + opening)
        assert writer.may_write(opened, f"Hm.\n{closing}{good}")
        assert not writer.may_write(opened, good)


@pytest.mark.parametrize("value", ["", 'a"\\b', "a\nb\t\u2028\x07", "é 😀 </x>"])
def test_listed_texts_stand_as_they_are_where_no_json_is_written(writer: Writer, value: str) -> None:
    schema = {"properties": {"a": {"enum": ["other", value]}}, "required": ["a"]}
    calls = CallOptions((Tool("find", parameters=schema),), must_call=True, may_call=True)
    grammar = writer.grammar("qwen3_5", calls)
    before, after = (
        "<tool_call>\n<function=find>\n<parameter=a>\n",
        "\n</parameter>\n</function>\n</tool_call>",
    )
    assert writer.may_write(grammar, before + value + after)
    assert not writer.may_write(grammar, f"{before}another{after}")


@pytest.mark.parametrize("family", ["qwen3_5", "gemma4"])
@pytest.mark.parametrize(
    ("schema", "part"),
    [
        ({"properties": {"a": {"type": "string", "pattern": "x"}}}, "pattern of a string"),
        ({"properties": {"a": {"type": "integer"}}, "minProperties": 1}, "minProperties"),
        ({"properties": {"a>:": {"type": "integer"}}}, "cannot write the name"),
    ],
    ids=str,
)
def test_a_schema_that_a_form_cannot_follow_is_named(
    writer: Writer, family: str, schema: dict[str, Any], part: str
) -> None:
    calls = CallOptions((Tool("find", parameters=schema),), must_call=True, may_call=True)
    with pytest.raises(GrammarError, match=f"parameters of find: .*{part}"):
        writer.grammar(family, calls)


def test_a_prompt_that_has_ended_the_thinking_leaves_none_to_the_grammar(writer: Writer) -> None:
    form = GrammarSource(
        "json_schema", '{"type": "object", "properties": {}, "additionalProperties": false}', "f"
    )
    prompt = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    source = answer_source(
        form, CallOptions(), load_family("hermes"), TokenizedPrompt([1], prompt), writer.model
    )
    assert source is form


def test_a_form_beside_calls_that_nobody_can_write_is_refused(writer: Writer) -> None:
    form = GrammarSource("json_object", "", "response_format")
    unknown = msgspec.structs.replace(load_family("hermes"), calls=None)
    with pytest.raises(BadRequestError, match="--tool-template"):
        answer_source(
            form, CallOptions(LOOSE, may_call=True), unknown, TokenizedPrompt([1], ""), writer.model
        )
