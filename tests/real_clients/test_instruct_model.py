"""A real instruct model behind the server: its structured output and its calls are sensible, and its raw rows are its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import pytest
from live_server import serving
from logitclient import Client, decode_logits
from logitengine.model.checkpoint.resolve import Checkpoint
from openai import OpenAI
from pydantic import BaseModel, Field

pytestmark = [pytest.mark.clients, pytest.mark.timeout(900)]

MODEL = "qwen-coder"
SENTENCE = "A parcel arrived on Tuesday. It weighs 12 kilograms, and the box is green."

CITY = {"type": "string"}
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": CITY, "unit": {"enum": ["celsius", "fahrenheit"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
TIME: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_time",
        "description": "Get the time of day in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": CITY},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


class Parcel(BaseModel):
    """What is said about a parcel."""

    day: Literal["Monday", "Tuesday", "Wednesday"]
    kilograms: int = Field(ge=0, le=1000)
    colour: Literal["red", "green", "blue"]


@pytest.fixture(scope="module")
def qwen_url(tmp_path_factory: pytest.TempPathFactory, qwen_coder: Checkpoint) -> Iterator[str]:
    arguments = ("--model", str(qwen_coder.path), "--served-model-name", MODEL, "--kv-cache-bytes", "256MiB")
    with serving(tmp_path_factory.mktemp("qwen") / "server.log", *arguments) as server:
        yield server.url


def test_an_instruct_model_fills_a_schema_with_what_it_read(qwen_url: str) -> None:
    """The raw rows beside it are those of the same ids without a grammar, to the bit."""
    with OpenAI(base_url=f"{qwen_url}/v1", api_key="none", max_retries=0, timeout=240) as openai:
        answer = openai.chat.completions.parse(
            model=MODEL,
            messages=[{"role": "user", "content": f"{SENTENCE} Describe the parcel as JSON."}],
            max_tokens=64,
            temperature=0,
            response_format=Parcel,
            extra_body={"return_token_ids": True, "return_logits": True},
        )
    (choice,) = answer.choices
    assert choice.finish_reason == "stop"
    assert choice.message.parsed == Parcel(day="Tuesday", kilograms=12, colour="green")

    prompt, token_ids = (
        (answer.model_extra or {})["prompt_token_ids"],
        (choice.model_extra or {})["token_ids"],
    )
    with Client(qwen_url, timeout=240) as client:
        free = client.logits([*prompt, *token_ids], positions="prompt")[0].logits.prompt
    (rows,) = decode_logits(answer)
    assert rows is not None
    assert rows.generated is not None
    assert free is not None
    assert rows.generated.values.tobytes() == free.values[len(prompt) - 1 : -1].tobytes()


@pytest.mark.parametrize(
    "choice",
    ["required", {"type": "function", "function": {"name": "get_weather"}}, "auto"],
    ids=["required", "named", "auto"],
)
def test_an_instruct_model_calls_a_tool_and_answers_with_its_result(qwen_url: str, choice: Any) -> None:
    """Under auto this model writes calls in a fence of JSON. Streamed and whole, both turns are the same."""
    asked: dict[str, Any] = {
        "model": MODEL,
        "tools": [WEATHER, TIME],
        "parallel_tool_calls": False,
        "temperature": 0,
        "max_tokens": 96,
    }
    user: dict[str, Any] = {"role": "user", "content": "What is the weather in Paris in celsius?"}
    with OpenAI(base_url=f"{qwen_url}/v1", api_key="none", max_retries=0, timeout=240) as openai:

        def answer(messages: list[dict[str, Any]], tool_choice: Any) -> Any:
            body = {**asked, "messages": messages, "tool_choice": tool_choice}
            whole = openai.chat.completions.create(**body).choices[0]
            with openai.chat.completions.stream(**body) as stream:
                streamed = stream.get_final_completion().choices[0]
            assert streamed.finish_reason == whole.finish_reason
            assert (streamed.message.content or None) == whole.message.content
            assert functions(streamed.message) == functions(whole.message)
            return whole

        first = answer([user], choice)
        assert (first.finish_reason, first.message.content) == ("tool_calls", None)
        assert functions(first.message) == [("get_weather", {"city": "Paris", "unit": "celsius"})]
        result = {
            "role": "tool",
            "tool_call_id": first.message.tool_calls[0].id,
            "content": '{"degrees": 21, "sky": "clear"}',
        }
        question = {"role": "user", "content": "Tell me in one sentence."}
        second = answer([user, first.message.to_dict(), result, question], "auto")
        assert second.finish_reason == "stop"
        assert second.message.tool_calls is None
        assert "21" in second.message.content


def functions(message: Any) -> list[tuple[str, Any]]:
    """Return the names and the parsed arguments of a message's calls."""
    calls = message.tool_calls or []
    return [(call.function.name, json.loads(call.function.arguments)) for call in calls]
