"""Clients that people use, with the fields that they send, against the real server. Run by ``make test-clients``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from client_programs import FOLDER, run_node, run_python
from jsonschema import Draft202012Validator
from logitengine.model.checkpoint.resolve import Checkpoint

pytestmark = pytest.mark.clients

TASKS = FOLDER / "lm_eval_tasks"
FRUIT = Draft202012Validator(
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 16},
            "colour": {"enum": ["red", "green", "yellow"]},
            "grams": {"type": "integer", "minimum": 1, "maximum": 5000},
            "tags": {"type": "array", "items": {"enum": ["sweet", "sour", "round"]}, "maxItems": 2},
        },
        "required": ["name", "colour", "grams", "tags"],
        "additionalProperties": False,
    }
)
CONTEXT = "This model's maximum context length is 8192 tokens."


def fruits_of(found: dict[str, Any], count: int, member: str = "fruits") -> list[Any]:
    """Return the objects that the client parsed, once they are known to follow the schema."""
    fruits: list[Any] = found[member]
    assert len(fruits) == count
    for fruit in fruits:
        FRUIT.validate(fruit)
    return fruits


def are_equal(answers: list[Any]) -> bool:
    """Tell whether greedy answers are the same, streamed or whole."""
    return all(answer == answers[0] for answer in answers)


@pytest.mark.parametrize("environment", [None, "chat"], ids=["openai 3", "openai 2"])
def test_openai_parses_into_pydantic_models(server_url: str, environment: str | None, tmp_path: Path) -> None:
    found = run_python("with_openai.py", server_url, environment=environment, work=tmp_path)
    assert are_equal(fruits_of(found, 2))
    assert {"chunk", "content.delta", "content.done"} <= set(found["events"])
    assert found["cut"] == "LengthFinishReasonError"
    calls = fruits_of(found, 2, "calls")
    assert are_equal(calls)
    assert (found["names"], found["finish_reasons"]) == (["record_fruit"] * 2, ["tool_calls"] * 2)
    assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= set(
        found["call_events"]
    )
    assert json.loads(found["arguments"]) == calls[0]


def test_openai_of_npm_parses_into_zod_objects(server_url: str, tmp_path: Path) -> None:
    found = run_node("parse.mjs", server_url, package="openai", work=tmp_path)
    assert are_equal(fruits_of(found, 2))
    calls = fruits_of(found, 2, "calls")
    assert are_equal(calls)
    assert (found["names"], found["finishReasons"]) == (["record_fruit"] * 2, ["tool_calls"] * 2)
    assert json.loads(found["pieces"]) == calls[0]


def test_the_ai_sdk_gets_objects_texts_and_errors(server_url: str, tmp_path: Path) -> None:
    found = run_node("ai_sdk.mjs", server_url, package="ai", work=tmp_path)
    assert are_equal(fruits_of(found, 3))
    assert are_equal(fruits_of(found, 2, "calls"))
    assert (found["names"], found["callReasons"]) == (["recordFruit"] * 2, ["tool-calls"] * 2)
    whole, streamed = found["texts"]
    assert whole == streamed != ""
    assert (found["usage"], found["finishReasons"]) == (4, ["stop", "length"])
    status, message = found["refused"]
    assert status == 400
    assert message.startswith(CONTEXT)


def test_langchain_gets_structured_output_and_knows_the_context_error(
    server_url: str, tmp_path: Path
) -> None:
    found = run_python("with_langchain.py", server_url, environment="chat", work=tmp_path)
    assert are_equal(fruits_of(found, 5))
    assert are_equal(fruits_of(found, 2, "calls"))
    assert found["names"] == ["Fruit", "Fruit"]
    assert are_equal(fruits_of(found, 2, "function_calling"))
    assert 4 < found["usage"] < 96
    assert found["streamed_usage"] == 4
    assert CONTEXT in found["too_long"]


def test_instructor_reads_objects_in_four_modes(server_url: str, tmp_path: Path) -> None:
    found = run_python("with_instructor.py", server_url, environment="chat", work=tmp_path)
    assert found["modes"] == ["JSON", "JSON_SCHEMA", "MD_JSON", "TOOLS"]
    fruits = fruits_of(found, 4)
    assert {fruit["colour"] for fruit in fruits} == {"yellow"}


def test_litellm_gets_objects_and_knows_the_context_error(server_url: str, tmp_path: Path) -> None:
    found = run_python("with_litellm.py", server_url, environment="chat", work=tmp_path)
    assert are_equal(fruits_of(found, 4))
    assert set(found["too_long"]) == {"openai", "hosted_vllm"}
    for message in found["too_long"].values():
        assert CONTEXT in message


def test_llama_index_predicts_objects_and_texts(server_url: str, tmp_path: Path) -> None:
    found = run_python("with_llama_index.py", server_url, environment="chat", work=tmp_path)
    assert are_equal(fruits_of(found, 3))
    texts = found["texts"]
    assert texts["chat"] == texts["chat stream"] != ""
    assert texts["completion"] == texts["completion stream"]
    assert texts["completion"].startswith(" Paris")


def test_haystack_generates_objects(server_url: str, tmp_path: Path) -> None:
    found = run_python("with_haystack.py", server_url, environment="chat", work=tmp_path)
    assert are_equal(fruits_of(found, 3))
    assert found["finish_reasons"] == ["stop", "stop"]


def test_agents_of_pydantic_ai_have_typed_outputs(server_url: str, tmp_path: Path) -> None:
    found = run_python("with_pydantic_ai.py", server_url, environment="chat", work=tmp_path)
    whole, streamed, _ = fruits_of(found, 3)
    assert whole == streamed
    assert are_equal(fruits_of(found, 2, "calls"))
    assert found["text"]


def test_agents_of_openai_call_a_tool(server_url: str, tmp_path: Path) -> None:
    found = run_python("with_openai_agents.py", server_url, environment="chat", work=tmp_path)
    whole, streamed = fruits_of(found, 2, "calls")
    assert whole == streamed
    assert found["outputs"] == [f"recorded {whole['name']}"] * 2
    assert {"raw_response_event", "run_item_stream_event"} <= set(found["events"])


def test_smolagents_model_calls_a_tool(server_url: str, tmp_path: Path) -> None:
    found = run_python("with_smolagents.py", server_url, environment="chat", work=tmp_path)
    whole, streamed = found["calls"]
    assert whole == streamed
    assert (set(whole), found["names"]) == ({"colour", "grams"}, ["record_fruit", "record_fruit"])
    assert whole["colour"] in {"red", "green", "yellow"}
    assert isinstance(whole["grams"], int)


@pytest.mark.parametrize(
    ("environment", "version"), [(None, "0.4.13"), ("lm-eval-0.4.9.2", "0.4.9.2")], ids=str
)
def test_lm_eval_scores_what_chats_generate(
    server_url: str, environment: str | None, version: str, tmp_path: Path
) -> None:
    found = run_python(
        "with_lm_eval.py", server_url, TASKS, environment=environment, work=tmp_path, cwd=TASKS
    )
    assert found["version"] == version
    assert found["answers"][0] == "The capital of France is Paris."
    assert all(answer and "\n" not in answer for answer in found["answers"])
    assert found["score"] == pytest.approx(1 / 3)


def test_guidellm_measures_every_request(server_url: str, smollm2: Checkpoint, tmp_path: Path) -> None:
    results = run_python(
        "with_guidellm.py",
        server_url,
        smollm2.tokenizer_path,
        tmp_path,
        environment="guidellm",
        work=tmp_path,
    )
    (benchmark,) = results["benchmarks"]
    requests = benchmark["requests"]
    assert (len(requests["successful"]), requests["errored"]) == (4, [])
    for request in requests["successful"]:
        assert request["output_tokens"] == 8
        assert request["prompt_tokens"] > 24
        assert request["time_to_first_token_ms"] > 0
