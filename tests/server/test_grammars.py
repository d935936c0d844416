"""response_format and structured_outputs: what becomes the engine's grammar, and what is refused by name."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from httpx import Response
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer
from logitengine.grammar.vocabulary import GrammarError
from logitengine.link.messages import GenerationRequest, StepOutput
from logitserve.grammars import verdicts
from logitserve.grammars.frames import Verdict
from logitserve.grammars.lines import Line
from logitserve.grammars.schemas import drop_idle
from logitserve.grammars.source import GrammarSource
from logitserve.grammars.translation import translate
from logitserve.grammars.verdicts import KeptVerdicts, digest_of
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


async def test_an_equal_grammar_is_checked_once(open_app: OpenApp) -> None:
    good = {"response_format": json_schema({"type": "integer"})}
    bad = {"response_format": json_schema({"not": {}})}
    async with open_app(one_token) as app:
        for fields, status in ((good, 200), (bad, 400)):
            assert (await app.post(CHAT, body(CHAT, **fields))).status_code == status
        await app.state.grammars.close()
        for fields, status in ((good, 200), (bad, 400)):
            assert (await app.post(CHAT, body(CHAT, **fields))).status_code == status
            assert app.state.grammars._process is None
        first, second = app.engine.requests
        assert first.grammar == second.grammar


def test_kept_verdicts_are_bounded_in_bytes_and_those_of_a_busy_machine_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept, large = KeptVerdicts(), "x" * 1_000_000
    digests = [digest_of(GrammarSource("regex", str(number), "regex")) for number in range(20)]
    for digest in digests:
        kept.add(digest, Verdict(1, "good", large))
        kept.add(digest, Verdict(1, "good", large))
        assert kept.get(digests[0]) is not None, "what is used stays"
        assert kept.nbytes <= verdicts.MOST_BYTES
    assert [kept.get(digest) is None for digest in digests] == [False, *[True] * 16, False, False, False]
    now = time.monotonic()
    kept.add(digests[1], Verdict(1, "timeout"))
    kept.add(digests[2], Verdict(1, "refused"))
    monkeypatch.setattr(time, "monotonic", lambda: now + 59)
    assert kept.get(digests[1]) is not None
    monkeypatch.setattr(time, "monotonic", lambda: now + 62)
    assert kept.get(digests[1]) is None
    assert kept.get(digests[2]) is not None


async def test_a_large_grammar_is_refused_with_the_flag_that_moves_the_bound(open_app: OpenApp) -> None:
    async with open_app(one_token, max_grammar_bytes=100) as app:
        fields = {"response_format": json_schema({"description": "x" * 100})}
        answer = await app.post(CHAT, body(CHAT, **fields))
        assert app.state.grammars._process is None
    assert answer.status_code == 400
    assert "--max-grammar-bytes" in answer.json()["error"]["message"]


SLOW: dict[str, Any] = {"allOf": [{"type": "string", "pattern": f"a.{{{i}}}b"} for i in range(40)]}
"""A schema of 2 kB that takes minutes to compile."""


def slow(title: str = "") -> dict[str, Any]:
    """Return a body with a schema that takes minutes, for each title another one."""
    return body(CHAT, response_format=json_schema({**SLOW, "title": title}))


async def test_a_grammar_that_compiles_for_long_is_refused_while_others_are_served(open_app: OpenApp) -> None:
    async with open_app(one_token, grammar_timeout=2) as app:
        refused = asyncio.create_task(app.post(CHAT, slow()))
        await running_forks(app, 1)
        for fields in ({}, {"structured_outputs": {"choice": ["a", "b"]}}):
            assert (await app.post(CHAT, body(CHAT, **fields))).status_code == 200
        assert not refused.done()
        error = refused_with(await refused, 400)
        assert (error["code"], error["param"]) == ("grammar_timeout", SCHEMA)
        assert "--grammar-timeout" in error["message"]


async def test_many_slow_grammars_hold_up_nobody_but_each_other(open_app: OpenApp) -> None:
    async with open_app(one_token, grammar_timeout=30) as app:
        attackers = [asyncio.create_task(app.post(CHAT, slow(str(i)))) for i in range(12)]
        await running_forks(app, 2)
        for choice in ("a", "b", "c"):
            quick = body(CHAT, structured_outputs={"choice": [choice]})
            assert (await app.post(CHAT, quick)).status_code == 200
        assert not any(attacker.done() for attacker in attackers), "a minute of compiling was not waited for"
        for attacker in attackers:
            attacker.cancel()
        await asyncio.gather(*attackers, return_exceptions=True)


async def test_equal_slow_grammars_share_a_check_and_its_verdict_is_kept(open_app: OpenApp) -> None:
    async with open_app(one_token, grammar_timeout=2) as app:
        answers = await asyncio.gather(*(app.post(CHAT, slow()) for _ in range(60)))
        assert {refused_with(answer, 400)["code"] for answer in answers} == {"grammar_timeout"}
        await app.state.grammars.close()
        text_form = body(CHAT, structured_outputs={"json": json.dumps(SLOW | {"title": ""})})
        error = refused_with(await app.post(CHAT, text_form), 400)
        assert (error["code"], error["param"]) == ("grammar_timeout", "structured_outputs.json")
        assert app.state.grammars._process is None, "the verdict was kept"


async def test_a_check_goes_on_when_its_client_has_left(open_app: OpenApp) -> None:
    async with open_app(one_token, grammar_timeout=2) as app:
        leaver = asyncio.create_task(app.post(CHAT, slow()))
        (fork,) = await running_forks(app, 1)
        leaver.cancel()
        await asyncio.gather(leaver, return_exceptions=True)
        assert refused_with(await app.post(CHAT, slow()), 400)["code"] == "grammar_timeout"
        assert fork not in forks_of(app)
        assert not app.state.grammars._checks


async def test_a_check_that_nobody_waits_for_any_more_leaves_its_line(open_app: OpenApp) -> None:
    async with open_app(one_token, grammar_timeout=30) as app:
        first = [asyncio.create_task(app.post(CHAT, slow(title))) for title in "ab"]
        await running_forks(app, 2)
        leaver = asyncio.create_task(app.post(CHAT, slow("the last in the line")))
        while len(app.state.grammars._checks) < 3:  # noqa: ASYNC110 - nobody is told that a check was made
            await asyncio.sleep(0)
        leaver.cancel()
        await asyncio.gather(leaver, return_exceptions=True)
        assert len(app.state.grammars._checks) == 2
        for task in first:
            task.cancel()
        await asyncio.gather(*first, return_exceptions=True)


async def test_a_grammar_that_was_tried_for_nobody_does_not_join_the_slow_ones(open_app: OpenApp) -> None:
    async with open_app(one_token, grammar_timeout=30) as app:
        first = asyncio.create_task(app.post(CHAT, slow("a")))
        await running_forks(app, 1)
        leaver = asyncio.create_task(app.post(CHAT, slow("b")))
        await running_forks(app, 2)
        leaver.cancel()
        await asyncio.gather(leaver, return_exceptions=True)
        while len(app.state.grammars._checks) > 1:  # noqa: ASYNC110 - nobody is told that a check has ended
            await asyncio.sleep(0.01)
        assert not first.done()
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)


async def test_a_grammar_that_waits_for_others_for_long_is_told_to_come_again(open_app: OpenApp) -> None:
    async with open_app(one_token, queue_timeout=0.1) as app:
        async with app.state.grammars._quick.turn(1):
            answer = await app.post(CHAT, body(CHAT, response_format={"type": "json_object"}))
        assert refused_with(answer, 503)["code"] == "queue_timeout"
        assert "Retry-After" in answer.headers


async def test_places_are_given_to_the_shortest_first() -> None:
    line, order = Line(1), []

    async def stand(length: int) -> None:
        async with line.turn(length):
            order.append(length)

    async with line.turn(9):
        tasks = [asyncio.create_task(stand(length)) for length in (3, 1, 2, 1)]
        await asyncio.sleep(0)
        tasks[1].cancel()
        await asyncio.sleep(0)
    await asyncio.gather(*tasks, return_exceptions=True)
    assert order == [1, 2, 3]
    async with line.turn(1):
        pass


async def test_the_ways_in_which_a_check_dies_are_told_apart(
    open_app: OpenApp, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_app(one_token, grammar_timeout=30) as app:
        for number, status, code in (
            (signal.SIGKILL, 400, "grammar_too_large"),
            (signal.SIGABRT, 400, "grammar_too_large"),
            (signal.SIGSEGV, 500, "grammar_check_failed"),
        ):
            working = asyncio.create_task(app.post(CHAT, slow(number.name)))
            (fork,) = await running_forks(app, 1)
            assert "the check of a grammar died" not in caplog.text
            os.kill(fork, number)
            error = refused_with(await working, status)
            assert (error["code"], error["param"]) == (code, SCHEMA)
        assert "the check of a grammar died" in caplog.text
        working = asyncio.create_task(app.post(CHAT, slow("no memory")))
        (fork,) = await running_forks(app, 1)
        while resource.prlimit(fork, resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:  # noqa: ASYNC110 - no event
            await asyncio.sleep(0.01)
        assert resource.prlimit(fork, resource.RLIMIT_AS)[0] < 2 << 30
        resource.prlimit(fork, resource.RLIMIT_AS, (1 << 20, 1 << 20))
        error = refused_with(await working, 400)
        assert (error["code"], "1024 MiB" in error["message"]) == ("grammar_too_large", True)
        process = app.state.grammars._process
        assert (await app.post(CHAT, body(CHAT, structured_outputs={"regex": "b"}))).status_code == 200
        assert app.state.grammars._process is process, "the others' process lived on"


async def test_a_lost_process_is_replaced_and_no_verdict(
    open_app: OpenApp, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_app(one_token, grammar_timeout=30) as app:
        working = asyncio.create_task(app.post(CHAT, slow()))
        (fork,) = await running_forks(app, 1)
        await kill_checker(app)
        answer = await working
        assert refused_with(answer, 503)["code"] == "grammar_checker_lost"
        assert "Retry-After" in answer.headers
        assert "the process that compiles grammars was lost" in caplog.text
        os.kill(fork, signal.SIGKILL)
        assert (await app.post(CHAT, body(CHAT, structured_outputs={"regex": "b"}))).status_code == 200


def refused_with(answer: Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    return error


def forks_of(app: App) -> list[int]:
    process = app.state.grammars._process
    if process is None or process.is_lost:
        return []
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(child) for child in children.split()]


async def running_forks(app: App, count: int) -> list[int]:
    """Return the processes that compile, once there are so many and they have begun with the last of their lines."""
    while (  # noqa: ASYNC110 - the process tells nobody whom it has started
        len(forks := forks_of(app)) < count or not app.state.grammars._thorough._is_taken
    ):
        await asyncio.sleep(0.01)
    return forks


async def kill_checker(app: App) -> None:
    process = app.state.grammars._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    await process._process.wait()


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
