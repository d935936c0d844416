"""Tools over HTTP with the default model, whose chat template knows none: calls by a grammar, and a conversation with them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from logitclient import Client
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam

CHAT = "/v1/chat/completions"

WEATHER: ChatCompletionToolParam = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 12},
                "unit": {"enum": ["celsius", "fahrenheit"]},
            },
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
TIME: ChatCompletionToolParam = {
    "type": "function",
    "function": {"name": "get_time", "description": "The time of day.", "strict": True},
}
QUESTION: ChatCompletionMessageParam = {"role": "user", "content": "What is the weather in Paris?"}


@pytest.fixture(scope="module")
def url(server_url: str) -> str:
    return server_url


@pytest.fixture(scope="module")
def model(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


def test_a_required_call_is_answered_and_the_conversation_goes_on(model: openai.OpenAI) -> None:
    """The call follows its schema. Its answer is read, by the model's own template, in a second turn."""
    name = model.models.list().data[0].id
    first = model.chat.completions.create(
        model=name,
        messages=[QUESTION],
        tools=[WEATHER, TIME],
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=0,
        max_tokens=80,
    ).choices[0]
    assert first.finish_reason == "tool_calls"
    assert first.message.content is None
    assert first.message.tool_calls is not None
    (call,) = first.message.tool_calls
    assert call.type == "function"
    assert call.id.startswith("call_")
    assert call.function.name == "get_weather"
    arguments = json.loads(call.function.arguments)
    assert set(arguments) == {"city", "unit"}
    said: Any = first.message.to_dict()
    second = model.chat.completions.create(
        model=name,
        messages=[QUESTION, said, {"role": "tool", "tool_call_id": call.id, "content": '{"degrees": 21}'}],
        tools=[WEATHER, TIME],
        tool_choice="none",
        temperature=0,
        max_tokens=8,
    ).choices[0]
    assert second.message.content
    assert second.message.tool_calls is None


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "get_time"}}], ids=str
)
def test_a_stream_and_a_whole_answer_have_the_same_calls(model: openai.OpenAI, choice: Any) -> None:
    body: dict[str, Any] = {
        "model": model.models.list().data[0].id,
        "messages": [QUESTION],
        "tools": [WEATHER, TIME],
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "temperature": 0,
        "max_tokens": 80,
    }
    whole = model.chat.completions.create(**body).choices[0]
    with model.chat.completions.stream(**body) as stream:
        chunks = [event for event in stream if event.type == "chunk"]
        streamed = stream.get_final_completion().choices[0]
    assert whole.message.tool_calls
    assert functions(streamed) == functions(whole)
    assert (streamed.finish_reason, streamed.message.content or None) == (
        whole.finish_reason,
        whole.message.content,
    )
    pieces = [
        call for event in chunks for choice in event.chunk.choices for call in choice.delta.tool_calls or []
    ]
    first, *rest = [piece for piece in pieces if piece.index == 0]
    assert first.id
    assert first.function
    assert (first.function.name, first.function.arguments) == (whole.message.tool_calls[0].function.name, "")
    assert all(piece.id is None and piece.function and piece.function.name is None for piece in rest)
    if choice != "required":
        assert [name for name, _ in functions(whole)] == ["get_time"]
        assert functions(whole)[0][1] == {}


def functions(choice: Any) -> list[tuple[str, Any]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls]


def test_rows_of_calls_are_those_of_the_same_tokens(url: str) -> None:
    """Every token of a call that was held back has its row and its log-probability, once, and bit for bit a plain run's."""
    body = {
        "messages": [QUESTION],
        "tools": [WEATHER],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "max_tokens": 48,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 2,
        "return_logits": {"top_k": 5, "encoding": "list"},
        "return_token_ids": True,
    }
    whole = httpx.post(url + CHAT, json=body, timeout=120).json()
    text = httpx.post(url + CHAT, json={**body, "stream": True}, timeout=120).text
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    deltas = [choice for event in events for choice in event["choices"]]
    choice = whole["choices"][0]
    ids = choice["token_ids"]
    assert choice["message"]["tool_calls"]
    assert [i for delta in deltas for i in delta.get("token_ids", [])] == ids
    for member in ("token_ids", "values"):
        rows = [row for delta in deltas if "logits" in delta for row in delta["logits"]["generated"][member]]
        assert rows == choice["logits"]["generated"][member]
    streamed = [entry for delta in deltas if delta["logprobs"] for entry in delta["logprobs"]["content"]]
    assert streamed == choice["logprobs"]["content"]
    assert len(streamed) == len(ids)
    prompt = whole["prompt_token_ids"]
    with Client(url, timeout=120) as client:
        plain = client.logits([*prompt, *ids], positions="prompt", top_k=5)[0].logits.prompt
    assert plain is not None
    values = np.array(choice["logits"]["generated"]["values"], np.float32)
    assert values.tobytes() == np.asarray(plain.values)[len(prompt) - 1 : -1].tobytes()


def test_what_cannot_be_called_is_refused_by_name(url: str) -> None:
    refused: list[tuple[dict[str, Any], str, str]] = [
        ({"tools": [TIME]}, "tool_choice", '"required"'),
        ({"tools": [TIME], "tool_choice": "auto"}, "tool_choice", "knows no tools"),
        ({"tools": [TIME] * 1000}, "tools", "--max-tools"),
    ]
    for fields, param, part in refused:
        error = httpx.post(url + CHAT, json={"messages": [QUESTION], "max_tokens": 1, **fields}).json()[
            "error"
        ]
        assert error["param"] == param
        assert part in error["message"]
