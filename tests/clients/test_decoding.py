"""The API's answers become results, and the OpenAI SDK's objects give their logits."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from logitclient import DecodeError, Logits, decode_logits, operations
from openai.types import Completion as OpenAICompletion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

VALUES = np.arange(6, dtype=np.float32).reshape(2, 3)
BLOCK = {
    "shape": [2, 3],
    "dtype": "float32",
    "encoding": "base64",
    "data": base64.b64encode(VALUES.tobytes()).decode(),
}
USAGE = {
    "prompt_tokens": 3,
    "completion_tokens": 2,
    "total_tokens": 5,
    "prompt_tokens_details": {"cached_tokens": 1},
}
TAIL = {
    "index": 0,
    "finish_reason": "length",
    "logprobs": None,
    "token_ids": [5, 6],
    "logits": {"stage": "raw", "generated": BLOCK, "prompt": {**BLOCK, "offset": 4}},
}


def answer(kind: str, choice: dict[str, Any], **others: Any) -> dict[str, Any]:
    """A fresh deep copy, as JSON gives."""
    body = {"id": "x-1", "object": kind, "created": 0, "model": "m", "choices": [choice], **others}
    copy: dict[str, Any] = json.loads(json.dumps(body))
    return copy


def chat_answer(**changes: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": "ab", "refusal": None}
    return answer("chat.completion", {"message": message, **TAIL, **changes}, usage=USAGE)


def text_answer(**changes: Any) -> dict[str, Any]:
    return answer("text_completion", {"text": "ab", **TAIL, **changes}, usage=USAGE)


def chunk(**changes: Any) -> dict[str, Any]:
    return answer("chat.completion.chunk", {"delta": {"content": "ab"}, **TAIL, **changes})


def check(found: Logits | None) -> None:
    assert found is not None
    assert found.stage == "raw"
    assert found.batch_invariant
    assert found.generated is not None
    assert found.prompt is not None
    assert np.array_equal(found.generated.values, VALUES)
    assert np.array_equal(found.prompt.values, VALUES)
    assert found.prompt.offset == 4


@pytest.mark.parametrize(
    ("operation", "body"),
    [(operations.chat([], {}), chat_answer()), (operations.complete("", {}), text_answer())],
    ids=["chat", "complete"],
)
def test_a_completion_has_text_rows_and_usage(operation: operations.Operation[Any], body: Any) -> None:
    found = operation.read(json.dumps(body).encode())
    assert (found.id, found.model, found.text, found.finish_reason) == ("x-1", "m", "ab", "length")
    assert found.token_ids.tolist() == [5, 6]
    assert (found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.cached_tokens) == (3, 2, 1)
    check(found.logits)
    assert found.hidden_states is None
    assert found.raw["object"] == body["object"]
    assert "logits" not in found.raw["choices"][0], "the encoded rows are not held beside the decoded ones"


def test_every_choice_is_kept() -> None:
    body = text_answer()
    body["choices"].append({"index": 1, "text": "cd", "finish_reason": "stop"})
    found = operations.complete("", {}).read(json.dumps(body).encode())
    assert [choice.text for choice in found.choices] == ["ab", "cd"]
    assert found.choices[1].logits is None
    assert found.choices[1].token_ids is None


def test_the_prompts_ids_of_a_chat_are_the_first_choices() -> None:
    choices = [{"index": i, "message": {"content": "a"}, "finish_reason": "stop"} for i in range(2)]
    body = {"id": "x", "model": "m", "choices": choices, "prompt_token_ids": [5, 7]}
    answer = operations.chat([], {}).read(json.dumps(body).encode())
    assert [choice.raw.get("prompt_token_ids") for choice in answer.choices] == [[5, 7], None]


def test_hidden_states_are_rows_too() -> None:
    states = {"generated": BLOCK, "prompt": {**BLOCK, "offset": 1}}
    found = operations.chat([], {}).read(json.dumps(chat_answer(hidden_states=states)).encode())
    assert found.hidden_states is not None
    assert found.hidden_states.generated is not None
    assert np.array_equal(found.hidden_states.generated.values, VALUES)
    assert found.hidden_states.to_torch().keys() == {"generated", "prompt"}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"null",
        b"{}",
        b'{"choices": 1}',
        json.dumps(chat_answer(message=None)).encode(),
        json.dumps(chat_answer(logits=[])).encode(),
        json.dumps(chat_answer(logits={"stage": "cooked"})).encode(),
        json.dumps(chat_answer(logits={"stage": "raw", "generated": 3})).encode(),
        json.dumps(chat_answer(token_ids=[1])).encode(),
        json.dumps(chat_answer(token_ids=["1", "2"])).encode(),
        json.dumps(chat_answer(token_ids=[1, 1 << 40])).encode(),
        json.dumps(chat_answer(hidden_states="x")).encode(),
        json.dumps({**chat_answer(), "usage": 3}).encode(),
        b"<html>",
        b"\xff",
    ],
)
def test_what_is_no_answer_is_a_decode_error(body: bytes) -> None:
    with pytest.raises(DecodeError):
        operations.chat([], {}).read(body)


# The OpenAI SDK.


@pytest.mark.parametrize(
    "response",
    [
        chat_answer(),
        ChatCompletion.model_validate(chat_answer()),
        ChatCompletion.construct(**chat_answer()),
        ChatCompletion.model_validate(chat_answer()).choices[0],
        ChatCompletionChunk.model_validate(chunk()),
        ChatCompletionChunk.model_validate(chunk()).choices[0],
        OpenAICompletion.model_validate(text_answer() | {"usage": None}),
        OpenAICompletion.model_validate(text_answer() | {"usage": None}).choices[0],
        text_answer()["choices"][0],
    ],
)
def test_logits_are_found_in_the_sdks_objects(response: object) -> None:
    (found,) = decode_logits(response)
    check(found)


def test_a_choice_without_logits_is_none() -> None:
    body = chat_answer()
    body["choices"].append(
        {"index": 1, "finish_reason": "stop", "message": {"role": "assistant", "content": ""}}
    )
    first, second = decode_logits(body)
    check(first)
    assert second is None
    assert decode_logits({"choices": []}) == []


def test_decoding_leaves_the_response_as_it_was() -> None:
    body = chat_answer()
    decode_logits(body)
    assert body == chat_answer()


def test_a_null_is_minus_infinity_where_filters_were_applied() -> None:
    written = {"shape": [1, 2], "dtype": "float32", "encoding": "list", "data": [[1.0, None]]}

    def value(stage: str) -> float:
        (found,) = decode_logits({"choices": [{"logits": {"stage": stage, "generated": written}}]})
        assert found is not None
        assert found.generated is not None
        return float(found.generated.values[0, 1])

    assert value("processed") == -math.inf
    assert math.isnan(value("raw"))


def test_a_warning_about_invariance_is_passed_on() -> None:
    (found,) = decode_logits({"logits": {"stage": "raw", "batch_invariant": False}})
    assert found is not None
    assert not found.batch_invariant


@pytest.mark.parametrize("response", [None, 3, "text", object()])
def test_what_has_no_choices_counts_as_a_choice_without_logits(response: object) -> None:
    assert decode_logits(response) == [None]


# Endpoints of our own.


def read(operation: operations.Operation[Any], body: dict[str, Any]) -> Any:
    return operation.read(json.dumps(body).encode())


def test_rows_of_each_input_are_read() -> None:
    entry = {
        "object": "logits",
        "index": 0,
        "token_ids": [],
        "prompt_token_ids": [1, 2],
        "logits": {"stage": "raw", "prompt": {**BLOCK, "offset": 0}},
        "hidden_states": {"prompt": {**BLOCK, "offset": 0}},
        "finish_reason": "length",
    }
    found = read(operations.logits("a", None, {}), {"model": "m", "data": [entry], "usage": USAGE})
    assert len(found) == 1
    assert found.model == "m"
    assert found[0].prompt_token_ids.tolist() == [1, 2]
    assert found[0].token_ids.dtype == np.int32
    assert np.array_equal(found[0].logits.prompt.values, VALUES)
    assert np.array_equal(found[0].hidden_states.prompt.values, VALUES)
    assert found[0].finish_reason == "length"
    assert "logits" not in found.raw["data"][0]


def test_perplexities_are_read() -> None:
    data = [
        {"object": "perplexity", "index": 0, "nll": 12.5, "num_tokens": 5, "perplexity": 12.18},
        {"object": "perplexity", "index": 1, "nll": 0.0, "num_tokens": 0, "perplexity": None},
    ]
    first, second = read(
        operations.perplexity(["a", "b"], {}),
        {"model": "m", "data": data, "usage": {"prompt_tokens": 6, "total_tokens": 6}},
    )
    assert (first.nll, first.num_tokens, first.perplexity) == (12.5, 5, 12.18)
    assert second.perplexity is None


@pytest.mark.parametrize(
    ("reward", "values", "shape"),
    [(0.5, [0.25, 0.5], (2,)), ([0.5, 1.0], [[0.0, 1.0], [0.5, 1.0]], (2, 2)), (None, None, None)],
)
def test_rewards_are_numbers_or_one_for_each_output(
    reward: Any, values: Any, shape: tuple[int, ...] | None
) -> None:
    entry = {"object": "reward", "index": 0, "reward": reward, "values": values}
    (found,) = read(
        operations.rewards("a", None, {}), {"model": "m", "head": "h", "data": [entry], "usage": {}}
    )
    assert found.head == "h"
    assert np.array_equal(found.reward, np.array(reward, np.float64), equal_nan=True)
    assert (found.values is None) == (shape is None)
    if shape is not None:
        assert found.values.shape == shape


@pytest.mark.parametrize("width", [1, 2, 3, 64])
def test_embeddings_are_asked_for_and_read_as_base64(width: int) -> None:
    vector = np.linspace(-1, 1, width, dtype=np.float32)
    operation = operations.embeddings(["a"], {"pooling": "last"})
    sent = json.loads(operation.request.content or b"")
    assert sent == {"input": ["a"], "pooling": "last", "encoding_format": "base64"}
    entry = {"index": 0, "embedding": base64.b64encode(vector.tobytes()).decode()}
    (found,) = read(operation, {"model": "m", "data": [entry], "usage": USAGE})
    assert np.array_equal(found.vector, vector)


def test_models_are_read_with_all_that_is_said_of_them() -> None:
    entry = {"id": "m", "vocab_size": 10, "max_model_len": 8, "batch_invariant": True, "kernels": "cpu"}
    (found,) = read(operations.models(), {"object": "list", "data": [entry]})
    assert (found.id, found.vocab_size, found.max_model_len, found.batch_invariant) == ("m", 10, 8, True)
    assert found.raw["kernels"] == "cpu"


@pytest.mark.parametrize(
    "make",
    [
        lambda: operations.logits("a", None, {}),
        lambda: operations.perplexity("a", {}),
        lambda: operations.rewards("a", None, {}),
        lambda: operations.embeddings("a", {}),
        operations.models,
    ],
)
@pytest.mark.parametrize("body", [b"{}", b'{"head": "h", "data": [{}]}', b'{"head": "h", "data": 3}', b"[]"])
def test_malformed_lists_are_decode_errors(
    make: Callable[[], operations.Operation[Any]], body: bytes
) -> None:
    with pytest.raises(DecodeError):
        make().read(body)


@pytest.mark.parametrize("embedding", ["AAA", "AAAA", "é", 3, [1.0], "A"])
def test_malformed_embeddings_are_decode_errors(embedding: Any) -> None:
    with pytest.raises(DecodeError):
        read(operations.embeddings("a", {}), {"data": [{"index": 0, "embedding": embedding}]})
