"""response_format and structured_outputs: what becomes the engine's grammar, and what is refused by name."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer
from logitengine.grammar.vocabulary import GrammarError
from logitengine.link.messages import GenerationRequest, StepOutput
from logitserve.grammars.schemas import drop_idle
from scripted_engine import App, OpenApp, Step

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
PATHS = (CHAT, "/v1/completions", "/v1/logits")
BYTES = LLTokenizer("byte")


def one_token(request: GenerationRequest) -> list[Step]:
    return [StepOutput(request_id=request.request_id, index=0, token_ids=[28], finish_reason="length")]


def body(path: str, **fields: Any) -> dict[str, Any]:
    prompt: dict[str, dict[str, Any]] = {
        CHAT: {"messages": [{"role": "user", "content": "Hi"}]},
        "/v1/completions": {"prompt": "Hi"},
        "/v1/logits": {"input": "Hi", "positions": "generated"},
    }
    return {**prompt[path], "max_tokens": 1, **fields}


def json_schema(schema: Any, **members: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, **members}}


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
    ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag", "Unknown"),
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


async def test_an_equal_grammar_is_checked_once(open_app: OpenApp) -> None:
    good = {"response_format": json_schema({"type": "integer"})}
    bad = {"response_format": json_schema({"not": {}})}
    async with open_app(one_token) as app:
        for fields, status in ((good, 200), (bad, 400)):
            assert (await app.post(CHAT, body(CHAT, **fields))).status_code == status
        await app.state.grammars.close()
        app.state.grammars._start = None  # type: ignore[method-assign, assignment]
        for fields, status in ((good, 200), (bad, 400)):
            assert (await app.post(CHAT, body(CHAT, **fields))).status_code == status
        first, second = app.engine.requests
    assert first.grammar == second.grammar


async def test_a_large_grammar_is_refused_with_the_flag_that_moves_the_bound(open_app: OpenApp) -> None:
    async with open_app(one_token, max_grammar_bytes=100) as app:
        fields = {"response_format": json_schema({"description": "x" * 100})}
        answer = await app.post(CHAT, body(CHAT, **fields))
        assert app.state.grammars._process is None
    assert answer.status_code == 400
    assert "--max-grammar-bytes" in answer.json()["error"]["message"]


SLOW: dict[str, Any] = {"allOf": [{"type": "string", "pattern": f"a.{{{i}}}b"} for i in range(20)]}
"""A schema of 800 bytes that takes a minute to compile."""


async def test_a_grammar_that_compiles_for_long_is_refused_and_its_process_replaced(
    open_app: OpenApp,
) -> None:
    async with open_app(one_token, grammar_timeout=2) as app:
        warm = body(CHAT, response_format={"type": "json_object"})
        assert (await app.post(CHAT, warm)).status_code == 200
        slow, other = await asyncio.gather(
            app.post(CHAT, body(CHAT, response_format=json_schema(SLOW))), app.post(CHAT, body(CHAT))
        )
        assert other.status_code == 200, "others are served meanwhile"
        assert slow.status_code == 400
        error = slow.json()["error"]
        assert (error["code"], error["param"]) == ("grammar_timeout", SCHEMA)
        assert "--grammar-timeout" in error["message"]
        later = body(CHAT, structured_outputs={"choice": ["a", "b"]})
        assert (await app.post(CHAT, later)).status_code == 200


async def test_a_grammar_that_waits_for_others_for_long_is_told_to_come_again(open_app: OpenApp) -> None:
    async with open_app(one_token, queue_timeout=0.1) as app:
        async with app.state.grammars._free:
            answer = await app.post(CHAT, body(CHAT, response_format={"type": "json_object"}))
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "queue_timeout"
        assert "Retry-After" in answer.headers


async def test_a_process_that_dies_fails_the_request_that_it_works_for_alone(open_app: OpenApp) -> None:
    async with open_app(one_token, grammar_timeout=100) as app:
        first = body(CHAT, response_format={"type": "json_object"})
        assert (await app.post(CHAT, first)).status_code == 200
        await kill_checker(app)
        assert (await app.post(CHAT, body(CHAT, structured_outputs={"regex": "a"}))).status_code == 200
        working = asyncio.create_task(app.post(CHAT, body(CHAT, response_format=json_schema(SLOW))))
        while not app.state.grammars._free.locked():  # noqa: ASYNC110 - a lock tells nobody that it was taken
            await asyncio.sleep(0)
        await kill_checker(app)
        answer = await working
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, SCHEMA)
        assert (await app.post(CHAT, body(CHAT, structured_outputs={"regex": "b"}))).status_code == 200


async def kill_checker(app: App) -> None:
    process = app.state.grammars._process
    assert process is not None
    os.kill(process._process.pid, signal.SIGKILL)
    await process._process.wait()


async def test_a_grammar_that_fails_within_the_answer_is_told_so(open_app: OpenApp) -> None:
    def failing(request: GenerationRequest) -> list[Step]:
        output = StepOutput(
            request_id=request.request_id,
            index=0,
            finish_reason="error",
            error="grammar_failed",
            error_detail="too many items",
        )
        return [output]

    async with open_app(failing) as app:
        answer = await app.post(CHAT, body(CHAT, response_format={"type": "json_object"}))
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["code"], "too many items" in error["message"]) == ("grammar_failed", True)


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
