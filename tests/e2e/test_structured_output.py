"""Structured output over HTTP: random answers of many schemas, raw rows, and grammars that are meant to do harm.

``LOGITSERVE_TEST_GENERATIONS`` is the number of random answers that are validated.
"""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

import httpx
import numpy as np
import pytest
from jsonschema import Draft202012Validator
from logitclient import Client, Logits, LogitsSpec
from numpy.typing import NDArray

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
GENERATIONS = int(os.environ.get("LOGITSERVE_TEST_GENERATIONS", "200"))

SHORT = {"type": "string", "maxLength": 6}
DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}


def closed(properties: dict[str, Any], *required: str, **more: Any) -> dict[str, Any]:
    """Return the schema of an object with these properties and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(required or properties),
        "additionalProperties": False,
        **more,
    }


SCHEMAS: list[dict[str, Any]] = [
    # Any value of a type.
    {"type": "null"},
    {"type": "boolean"},
    {"type": "integer", "minimum": -99, "maximum": 99},
    {"type": ["null", "boolean"]},
    {"type": ["integer", "null"], "minimum": 0, "maximum": 20},
    {"const": 5},
    {"const": 'a"b\\c\n'},
    {"const": {"a": [1, None, {"b": True}]}},
    {"enum": ["red", "green", 3, None, [1], {"a": "é"}]},
    {"enum": [-1, 0.5, 1e3]},
    # Numbers.
    {"type": "integer", "minimum": 3, "maximum": 1234},
    {"type": "integer", "exclusiveMinimum": -5, "exclusiveMaximum": 5},
    {"type": "integer", "minimum": 1.5, "maximum": 7.5},
    {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 70},
    {"type": "number", "minimum": 0, "maximum": 1, "multipleOf": 0.25},
    {"type": "number", "multipleOf": 0.125, "minimum": -1, "maximum": 1},
    # Strings.
    {"type": "string", "maxLength": 5},
    {"type": "string", "minLength": 2, "maxLength": 4},
    {"type": "string", "minLength": 3, "maxLength": 3},
    {"type": "string", "pattern": "^[A-Z]{2}[0-9]{3}$"},
    {"type": "string", "pattern": "^(cat|dog)s?$"},
    {"type": "string", "pattern": "^[A-ZÀ-Þ][a-zß-ÿ]{1,4}$"},
    {"type": "string", "pattern": "^\\d{1,3}(,\\d{3}){0,2}$"},
    {"type": "string", "pattern": "^[ab]*$", "maxLength": 8},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "time"},
    {"type": "string", "format": "date-time"},
    {"type": "string", "format": "ipv4"},
    {"type": "string", "format": "uuid"},
    {"type": "string", "format": "password", "maxLength": 5},
    # Arrays.
    {"type": "array", "items": DIGIT, "maxItems": 4},
    {"type": "array", "items": DIGIT, "minItems": 2, "maxItems": 3},
    {"type": "array", "items": SHORT, "minItems": 1, "maxItems": 2, "uniqueItems": False},
    {"type": "array", "prefixItems": [DIGIT, SHORT], "items": False},
    {"type": "array", "prefixItems": [DIGIT, SHORT], "items": False, "minItems": 2},
    {"type": "array", "prefixItems": [SHORT], "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    {"type": "array", "items": {"type": "array", "items": DIGIT, "maxItems": 2}, "maxItems": 2},
    {"type": "array", "maxItems": 0},
    {"type": "array", "items": {"enum": ["x", "y"]}, "maxItems": 1, "uniqueItems": True},
    # Objects.
    closed({"a": DIGIT}),
    closed({"a": DIGIT, "b": SHORT}, "a"),
    closed({"a": DIGIT, "b": SHORT, "c": {"type": "boolean"}}, "c"),
    closed({"a": {"type": "null"}, "nested": closed({"deep": closed({"deeper": DIGIT})})}),
    closed({'quote"\\': DIGIT, "é": SHORT, "": {"type": "boolean"}}),
    {
        "type": "object",
        "properties": {"a": DIGIT, "b": False},
        "required": ["a"],
        "additionalProperties": False,
    },
    {"type": "object", "additionalProperties": False},
    {
        "type": "object",
        "properties": {"a": DIGIT},
        "patternProperties": {"^x[0-9]$": {"type": "boolean"}},
        "additionalProperties": False,
        "required": ["a"],
        "maxProperties": 3,
    },
    {"type": "object", "additionalProperties": DIGIT, "propertyNames": True, "maxProperties": 0},
    closed({"a": DIGIT}, title="T", description="D", examples=[{"a": 1}], default={"a": 2}, deprecated=True),
    closed({"a": {"type": "integer", "format": "int32", "minimum": 0, "maximum": 99}}),
    closed(
        {
            "list": {
                "type": "array",
                "items": closed({"id": DIGIT, "tag": {"enum": ["p", "q"]}}),
                "maxItems": 2,
            }
        }
    ),
    # Combinations.
    {"anyOf": [DIGIT, {"type": "boolean"}]},
    {"anyOf": [closed({"kind": {"const": "a"}, "x": DIGIT}), closed({"kind": {"const": "b"}, "y": SHORT})]},
    {"oneOf": [{"type": "null"}, DIGIT]},
    {"oneOf": [closed({"t": {"const": 1}, "a": DIGIT}), closed({"t": {"const": 2}, "b": DIGIT})]},
    {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 9}]},
    {"allOf": [{"type": "string", "minLength": 2}, {"maxLength": 3}]},
    {"type": "integer", "minimum": 0, "maximum": 50, "allOf": [{"minimum": 40}]},
    {"anyOf": [{"const": "a"}, {"const": "b"}], "type": "string"},
    # References.
    {"$ref": "#/$defs/d", "$defs": {"d": DIGIT}},
    {"$ref": "#/definitions/d", "definitions": {"d": SHORT}},
    closed(
        {"a": {"$ref": "#/$defs/d"}, "b": {"$ref": "#/$defs/e"}},
        **{"$defs": {"d": DIGIT, "e": {"enum": [1, 2]}}},
    ),
    {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "https://a.example/s",
        "$comment": "c",
        **DIGIT,
    },
    {
        "$ref": "#/$defs/tree",
        "$defs": {
            "tree": closed(
                {
                    "v": DIGIT,
                    "next": {"anyOf": [{"type": "null"}, closed({"v": DIGIT, "next": {"type": "null"}})]},
                }
            )
        },
    },
    {
        "anyOf": [{"type": "null"}, {"$ref": "#/$defs/list"}],
        "$defs": {
            "list": closed({"head": DIGIT, "tail": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/list"}]}})
        },
    },
    # What constrains nothing.
    {
        **DIGIT,
        "not": False,
        "unevaluatedProperties": True,
        "if": {},
        "minContains": 1,
        "dependentRequired": {},
    },
]


@pytest.fixture(scope="module")
def url(tiny_url: str) -> str:
    return tiny_url


def schema_format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


def test_the_table_is_long_and_holds_schemas_alone() -> None:
    assert len(SCHEMAS) >= 60
    for schema in SCHEMAS:
        Draft202012Validator.check_schema(schema)


@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("unharmed")
def test_random_answers_are_valid(url: str) -> None:
    """A random model draws at temperature 1.5. Every answer that ends by itself validates, and most do."""
    ended, cut = asyncio.run(generate(url))
    for schema, text in ended:
        Draft202012Validator(schema).validate(json.loads(text))
    assert {json.dumps(schema) for schema, _ in ended} == {json.dumps(schema) for schema in SCHEMAS}
    assert len(ended) >= 0.75 * (len(ended) + cut) >= 0.75 * GENERATIONS


async def generate(url: str) -> tuple[list[tuple[dict[str, Any], str]], int]:
    """Return the answers that ended, with their schemas, and the number of those that were cut."""
    rounds = -(-GENERATIONS // len(SCHEMAS))
    ended: list[tuple[dict[str, Any], str]] = []
    cut = 0
    async with httpx.AsyncClient(
        base_url=url, timeout=600, limits=httpx.Limits(max_connections=16)
    ) as client:

        async def ask(schema: dict[str, Any], seed: int) -> None:
            nonlocal cut
            body = {
                "prompt": "Answer:",
                "max_tokens": 100,
                "temperature": 1.5,
                "seed": seed,
                "n": min(rounds, 16),
                "response_format": schema_format(schema),
            }
            answer = await client.post(COMPLETIONS, json=body)
            assert answer.status_code == 200, (schema, answer.text)
            for choice in answer.json()["choices"]:
                if choice["finish_reason"] == "stop":
                    ended.append((schema, choice["text"]))
                else:
                    assert choice["finish_reason"] == "length"
                    cut += 1

        await asyncio.gather(*(ask(schema, seed) for seed in range(-(-rounds // 16)) for schema in SCHEMAS))
    return ended, cut


def test_raw_rows_of_a_constrained_answer_are_those_of_a_free_one(url: str) -> None:
    """The same ids as a prompt, without a grammar, have the same raw rows. Processed rows hold what was allowed."""
    fields: dict[str, Any] = {
        "temperature": 1.0,
        "seed": 3,
        "max_tokens": 20,
        "structured_outputs": {"choice": ["good", "bad", "neutral"]},
    }
    prompt = [504, 3575, 282, 4649]
    with Client(url, timeout=60) as client:
        choice = client.complete(prompt, return_logits=True, **fields).choices[0]
        processed = client.complete(prompt, return_logits=LogitsSpec(stage="processed"), **fields).choices[0]
        assert choice.token_ids is not None
        token_ids = [int(token_id) for token_id in choice.token_ids]
        free = client.logits([*prompt, *token_ids], positions="prompt")[0]
    assert choice.text in ("good", "bad", "neutral")
    assert (choice.finish_reason, processed.text) == ("stop", choice.text)
    assert free.logits.prompt is not None
    raw = rows_of(choice.logits)
    assert raw.tobytes() == free.logits.prompt.values[len(prompt) - 1 : -1].tobytes()
    after = rows_of(processed.logits)
    allowed = np.isfinite(after)
    assert (allowed.sum(-1) > 0).all()
    assert (allowed.sum(-1) < 50).all()
    assert after[allowed].tobytes() == raw[allowed].tobytes()


def rows_of(logits: Logits | None) -> NDArray[Any]:
    """Return the generated rows."""
    assert logits is not None
    assert logits.generated is not None
    return logits.generated.values


def test_a_stream_and_every_endpoint_follow_the_grammar(url: str) -> None:
    fields = {
        "max_tokens": 30,
        "temperature": 1.5,
        "seed": 1,
        "structured_outputs": {"regex": "[a-f]{4}-[0-9]{2}"},
    }
    whole = httpx.post(
        url + CHAT, json={"messages": [{"role": "user", "content": "Hi"}], **fields}, timeout=60
    )
    text = whole.json()["choices"][0]["message"]["content"]
    letters, _, digits = text.partition("-")
    assert set(letters) <= set("abcdef")
    assert (len(letters), len(digits), digits.isdigit()) == (4, 2, True)
    streamed = ""
    body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True, **fields}
    with httpx.stream("POST", url + CHAT, json=body, timeout=60) as stream:
        for line in stream.iter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    streamed += choice["delta"].get("content") or ""
    assert streamed == text
    rows = httpx.post(
        url + "/v1/logits",
        json={"input": "Hi", "positions": "generated", "top_k": 1, **fields},
        headers={"Accept": "application/json"},
        timeout=60,
    ).json()["data"][0]
    told = httpx.post(url + "/detokenize", json={"tokens": rows["token_ids"]}, timeout=60).json()["prompt"]
    assert told[4] == "-"


LARGE = {
    "type": "object",
    "properties": {f"p{i}": {"type": "string", "description": "x" * 80} for i in range(9000)},
}
SLOW = {"allOf": [{"type": "string", "pattern": f"a.{{{i}}}b"} for i in range(40)]}
WIDE = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(500)}}
ENUM = {"enum": [f"value number {i}" for i in range(10_000)]}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema, "maxItems": 1}
    return schema


HOSTILE: list[tuple[str, dict[str, Any], int, str]] = [
    ("a schema of 1 MB", {"json": LARGE}, 400, "--max-grammar-bytes"),
    ("minutes of compiling", {"json": SLOW}, 400, "--grammar-timeout"),
    ("many properties", {"json": WIDE}, 200, ""),
    ("10,000 values", {"json": ENUM}, 200, ""),
    ("10,000 choices", {"choice": [f"choice {i}" for i in range(10_000)]}, 200, ""),
    ("nested 30 deep", {"json": nested(30)}, 200, ""),
    ("nested 90 deep", {"json": nested(90)}, 200, ""),
    ("nested 120 deep", {"json": nested(120)}, 400, "nested more than 100 deep"),
    ("nested 400 deep", {"json": nested(400)}, 400, "nested too deep"),
    ("a schema of itself", {"json": {"$ref": "#"}}, 400, "cannot be honoured"),
    ("nothing", {"json": {"type": "integer", "minimum": 2, "maximum": 1}}, 400, "Unsatisfiable"),
    ("states without end", {"regex": "(.{0,1000}a){200}"}, 200, ""),
    ("exponential states", {"regex": "[01]*1[01]{25}"}, 200, ""),
    ("exponential repetitions", {"regex": "((a{1,100}){1,100}){1,100}"}, 200, ""),
    ("nested parentheses", {"regex": "(" * 10_000 + "a" + ")" * 10_000}, 400, "regex"),
    ("no end", {"grammar": 'start: x\nx: "a" x'}, 400, "could not be followed any further"),
    ("every way of reading it", {"grammar": 'start: start start start | "b" | "bb"'}, 200, ""),
    ("no control tokens but by name", {"grammar": "start: <|no_such_token|>"}, 400, "unknown special token"),
]


@pytest.mark.usefixtures("unharmed")
def test_hostile_grammars_are_served_or_refused_and_disturb_nobody(url: str) -> None:
    """All come at once, and some twice. Neighbours, one of them with small grammars, ask all the while."""
    asyncio.run(attack(url))


async def attack(url: str) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        neighbour = {"prompt": "Once", "max_tokens": 100, "temperature": 0, "ignore_eos": True}
        expected = (await client.post(COMPLETIONS, json=neighbour)).json()["choices"]
        hostile = [asyncio.create_task(send(client, case)) for case in (*HOSTILE, *HOSTILE[:6])]
        num_served = 0
        while not all(task.done() for task in hostile):
            choice = f"choice {num_served}"
            small = {"prompt": "A", "max_tokens": 30, "structured_outputs": {"choice": [choice]}}
            free, constrained = await asyncio.gather(
                client.post(COMPLETIONS, json=neighbour), client.post(COMPLETIONS, json=small)
            )
            assert free.json()["choices"] == expected
            assert constrained.json()["choices"][0]["text"] == choice
            num_served += 1
        assert num_served
        await asyncio.gather(*hostile)


async def send(client: httpx.AsyncClient, case: tuple[str, dict[str, Any], int, str]) -> None:
    """Ask for 8 tokens with a hostile grammar, and check the answer."""
    name, grammar, status, part = case
    body = {"prompt": "A", "max_tokens": 8, "seed": 1, "structured_outputs": grammar}
    answer = await client.post(COMPLETIONS, json=body)
    assert answer.status_code == status, (name, answer.text)
    assert part in answer.text, (name, answer.text)
