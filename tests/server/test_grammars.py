"""response_format and structured_outputs: what becomes the engine's grammar, and what is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from formed_chats import CHAT, body, json_schema, one_token, refused_with
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer
from logitengine.grammar.vocabulary import GrammarError
from logitengine.link.messages import GenerationRequest, StepOutput
from logitserve.grammars.schemas import drop_idle
from logitserve.grammars.translation import translate
from scripted_engine import OpenApp, Step

pytestmark = pytest.mark.anyio

PATHS = (CHAT, "/v1/completions", "/v1/logits")
BYTES = LLTokenizer("byte")


def takes(grammar: str | None, text: str) -> bool:
    """Return whether the whole text follows the grammar."""
    assert grammar is not None
    matcher = LLMatcher(BYTES, grammar)
    assert not matcher.is_error(), matcher.get_error()
    return matcher.consume_tokens(list(text.encode())) and matcher.is_accepting()


GOOD: list[tuple[dict[str, Any], list[str], list[str]]] = [
    ({"response_format": {"type": "json_object"}}, ['{"a": [1, null]}', "{}"], ["[1]", '{"a" : 1}']),
    (
        {"response_format": json_schema({"type": "integer"}, strict=True, description="a number")},
        ["12", "-3"],
        ["1.5", '"1"'],
    ),
    ({"structured_outputs": {"json": {"enum": ["é", 2]}}}, ['"é"', "2"], ["é", "3"]),
    ({"structured_outputs": {"json": '{"const": [1, 2]}'}}, ["[1, 2]", "[1,2]"], ["[1,\n2]"]),
    ({"structured_outputs": {"json_object": True}}, ["{}"], ["1"]),
    ({"structured_outputs": {"regex": r"\d{3}-[a-c]+"}}, ["123-abc"], ["123-", "x123-a"]),
    ({"structured_outputs": {"choice": ["yes", "no", 'a"\n', "😀"]}}, ["yes", 'a"\n', "😀"], ["y"]),
    ({"structured_outputs": {"grammar": 'start: "a" start | "b"'}}, ["aab"], ["aa"]),
    ({"structured_outputs": {"grammar": 'root ::= "a" root | "b"'}}, ["aab"], ["aa"]),
]
"""Fields of a body, texts that they allow, and texts that they do not."""


async def test_a_body_becomes_the_grammar_of_the_engines_request(open_app: OpenApp) -> None:
    async with open_app(one_token) as app:
        for path in PATHS:
            for fields, good, bad in GOOD:
                answer = await app.post(path, body(path, **fields), headers={"Accept": "application/json"})
                assert answer.status_code == 200, answer.text
                grammar = app.engine.requests.pop().grammar
                assert all(takes(grammar, text) for text in good), fields
                assert not any(takes(grammar, text) for text in bad), fields


@pytest.mark.parametrize(
    "fields",
    [{}, {"response_format": {"type": "text"}}, {"response_format": None, "structured_outputs": None}],
)
async def test_without_a_form_there_is_no_grammar_and_no_checker(
    open_app: OpenApp, fields: dict[str, Any]
) -> None:
    async with open_app(one_token) as app:
        assert (await app.post(CHAT, body(CHAT, **fields))).status_code == 200
        assert app.engine.requests[0].grammar is None
        assert app.state.grammars._process is None


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=4), min_size=1, max_size=4),
    st.text(max_size=4),
)
@settings(max_examples=50, deadline=None)
def test_every_choice_is_taken_whole_and_nothing_else(choices: list[str], other: str) -> None:
    grammar = translate("choice", json.dumps(choices))
    for text in (*choices, *(choice + end for choice in choices for end in ("x", other)), other):
        assert takes(grammar, text) is (text in choices)


@pytest.mark.parametrize(
    "choice", ["", "\x7f", "\x00", "\\", '"', "\\n", "\n", "\u2028", "😀", "a/b|.*", "<|im_end|>", "é"]
)
def test_a_choice_may_be_any_text(choice: str) -> None:
    for choices in ([choice], [choice, "other"]):
        grammar = translate("choice", json.dumps(choices))
        for text in (choice, "other", choice + "x", "x" + choice, "\\"):
            assert takes(grammar, text) is (text in choices)


NEUTRAL: list[dict[str, Any]] = [
    {"structured_outputs": {"structural_tag": None, "whitespace_pattern": None, "json": None, "regex": "a"}},
    {
        "structured_outputs": {
            "disable_fallback": True,
            "disable_any_whitespace": False,
            "disable_additional_properties": False,
            "choice": ["a"],
        }
    },
    {"structured_outputs": {"disable_fallback": None, "disable_any_whitespace": None, "regex": "a"}},
    {"response_format": {"type": "text", "json_schema": None}},
    {"response_format": json_schema({}, strict=None, description=None)},
    {"guided_json": None, "guided_regex": None, "guided_choice": None, "guided_grammar": None},
]


async def test_nulls_and_neutral_values_are_absent(open_app: OpenApp) -> None:
    async with open_app(one_token) as app:
        for path in PATHS:
            for fields in NEUTRAL:
                answer = await app.post(path, body(path, **fields), headers={"Accept": "application/json"})
                assert answer.status_code == 200, (fields, answer.text)


async def test_an_answer_without_tokens_has_its_grammar_checked_but_not_made(open_app: OpenApp) -> None:
    def no_token(request: GenerationRequest) -> list[Step]:
        return [StepOutput(request_id=request.request_id, index=0, finish_reason="length")]

    async with open_app(no_token) as app:
        fields = {"max_tokens": 0, "echo": True, "structured_outputs": {"regex": "a"}}
        assert (await app.post("/v1/completions", body("/v1/completions", **fields))).status_code == 200
        assert [request.grammar for request in app.engine.requests] == [None]
        fields = {"max_tokens": 0, "echo": True, "structured_outputs": {"regex": "("}}
        refused_with(await app.post("/v1/completions", body("/v1/completions", **fields)), 400)
        assert len(app.engine.requests) == 1


SCHEMA = "response_format.json_schema.schema"


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": json_schema({"not": {"type": "string"}})}, SCHEMA, '"not"'),
    ({"response_format": json_schema({"uniqueItems": True})}, SCHEMA, '"uniqueItems"'),
    ({"response_format": json_schema({"properties": {"a": {"contains": {}}}})}, SCHEMA, '"contains"'),
    ({"response_format": json_schema({"format": "regex"})}, SCHEMA, "Unknown format: regex"),
    ({"response_format": json_schema({"x-guidance": {"lenient": True}})}, SCHEMA, '"x-guidance"'),
    (
        {"response_format": json_schema({"type": "string", "minLength": 3, "maxLength": 2})},
        SCHEMA,
        "minLength (3)",
    ),
    ({"response_format": json_schema({"enum": []})}, SCHEMA, "Unsatisfiable"),
    ({"response_format": json_schema({"$ref": "#"})}, SCHEMA, "NoExtension"),
    ({"response_format": json_schema({"$ref": "https://a.example/b"})}, SCHEMA, "a.example"),
    ({"response_format": json_schema({"pattern": "(?=a)"})}, SCHEMA, "look-around"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "json_schema"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "'json_schema'"),
    ({"response_format": json_schema(True)}, SCHEMA, "dictionary"),
    ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "exactly one"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "not valid JSON"),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex", "unclosed group"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "at least 1"),
    ({"structured_outputs": {"grammar": "start: x"}}, "structured_outputs.grammar", "unknown name"),
    ({"structured_outputs": {"grammar": "nonsense"}}, "structured_outputs.grammar", "::="),
    *(
        ({"structured_outputs": {name: value, "regex": "a"}}, f"structured_outputs.{name}", "not supported")
        for name, value in (
            ("structural_tag", "x"),
            ("whitespace_pattern", " "),
            ("disable_any_whitespace", True),
            ("disable_any_whitespace", 0),
            ("disable_additional_properties", True),
        )
    ),
    ({"structured_outputs": {"json_": None, "regex": "a"}}, "structured_outputs.json_", "Unknown field"),
    ({"response_format": json_schema(None)}, SCHEMA, "Missing field"),
    *(
        ({f"guided_{name}": "x"}, f"guided_{name}", f"send 'structured_outputs.{name}'")
        for name in ("json", "regex", "choice", "grammar")
    ),
    (
        {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
        "structured_outputs",
        "exclude each other",
    ),
]
"""Fields of a body, the field that the refusal names, and a part of its message."""


async def test_what_cannot_be_honoured_is_refused_by_name(open_app: OpenApp) -> None:
    async with open_app(one_token) as app:
        for fields, param, part in REFUSED:
            answer = await app.post(CHAT, body(CHAT, **fields))
            assert answer.status_code == 400, fields
            error = answer.json()["error"]
            assert error["param"] == param, fields
            assert part in error["message"], error
        assert app.engine.requests == []


async def test_a_large_grammar_is_refused_with_the_flag_that_moves_the_bound(open_app: OpenApp) -> None:
    async with open_app(one_token, max_grammar_bytes=100) as app:
        fields = {"response_format": json_schema({"description": "x" * 100})}
        answer = await app.post(CHAT, body(CHAT, **fields))
        assert app.state.grammars._process is None
    assert answer.status_code == 400
    assert "--max-grammar-bytes" in answer.json()["error"]["message"]


async def test_a_grammar_that_fails_within_the_answer_is_told_so(open_app: OpenApp) -> None:
    def failing(request: GenerationRequest) -> list[Step]:
        output = StepOutput(
            request_id=request.request_id,
            index=0,
            finish_reason="error",
            error="grammar_failed",
            error_detail="too many items" + 1000 * "!",
        )
        return [output]

    async with open_app(failing) as app:
        answer = await app.post(CHAT, body(CHAT, response_format=json_schema({})))
    error = refused_with(answer, 400)
    assert (error["code"], error["param"]) == ("grammar_failed", SCHEMA)
    assert "too many items" in error["message"]
    assert len(error["message"]) < 500


@pytest.mark.parametrize(
    ("schema", "kept"),
    [
        ({"type": "array", "uniqueItems": False}, {"type": "array"}),
        ({"uniqueItems": True, "maxItems": 1}, {"maxItems": 1}),
        ({"uniqueItems": True, "maxItems": 2}, {"uniqueItems": True, "maxItems": 2}),
        ({"format": "int32"}, {}),
        ({"format": "date"}, {"format": "date"}),
        ({"format": "iri"}, {"format": "iri"}),
        ({"unevaluatedProperties": True, "unevaluatedItems": {}}, {}),
        ({"unevaluatedProperties": False}, {"unevaluatedProperties": False}),
        ({"propertyNames": {}}, {}),
        ({"not": False}, {}),
        ({"if": {"type": "string"}}, {}),
        ({"then": {"type": "string"}, "else": {}}, {}),
        ({"if": {}, "then": {"minimum": 1}}, {"if": {}, "then": {"minimum": 1}}),
        ({"dependentRequired": {"a": []}, "dependentSchemas": {"b": True}}, {}),
        ({"dependentRequired": {"a": ["b"]}}, {"dependentRequired": {"a": ["b"]}}),
        ({"minContains": 2, "maxContains": 3}, {}),
        ({"contains": {"type": "string"}, "minContains": 0}, {}),
        ({"contains": {"type": "string"}}, {"contains": {"type": "string"}}),
        ({"const": {"format": "x", "uniqueItems": False}}, {"const": {"format": "x", "uniqueItems": False}}),
        ({"enum": [{"format": "x"}], "default": None}, {"enum": [{"format": "x"}], "default": None}),
        ({"properties": {"format": {"format": "x"}}}, {"properties": {"format": {}}}),
        ({"properties": {"not": False}}, {"properties": {"not": False}}),
        ({"items": {"format": "x"}}, {"items": {}}),
        (
            {"items": [{"format": "x"}], "prefixItems": [{"format": "y"}]},
            {"items": [{}], "prefixItems": [{}]},
        ),
        ({"$defs": {"a": {"anyOf": [{"format": "x"}]}}}, {"$defs": {"a": {"anyOf": [{}]}}}),
        ({"additionalProperties": {"format": "x"}}, {"additionalProperties": {}}),
    ],
)
async def test_only_what_constrains_nothing_is_dropped(schema: dict[str, Any], kept: dict[str, Any]) -> None:
    before = json.dumps(schema)
    assert drop_idle(schema) == kept
    assert json.dumps(schema) == before


async def test_a_schema_is_nested_so_deep_and_no_deeper() -> None:
    schema: dict[str, Any] = {}
    for _ in range(100):
        schema = {"items": schema}
    assert drop_idle(schema) == schema
    with pytest.raises(GrammarError, match="nested more than 100 deep"):
        drop_idle({"items": schema})
