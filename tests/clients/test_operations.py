"""What each call sends."""

from __future__ import annotations

import json
from typing import Any, cast

import numpy as np
import pytest
from logitclient import HiddenStatesSpec, LogitsSpec, operations
from logitclient.options import (
    ChatOptions,
    CompletionOptions,
    DetokenizeOptions,
    EmbeddingOptions,
    InputOptions,
    LogitsOptions,
    PoolingOptions,
    RewardOptions,
    TokenizeOptions,
)
from logitserve.protocol.base import RequestBody
from logitserve.protocol.chat import ChatBody
from logitserve.protocol.completions import CompletionBody
from logitserve.protocol.logits import LogitsBody
from logitserve.protocol.readouts import EmbeddingsBody, PerplexityBody, PoolingBody, RewardsBody
from logitserve.protocol.tokens import DetokenizeBody, TokenizeBody

MESSAGES = [{"role": "user", "content": "Hi"}]


def sent(operation: operations.Operation[Any] | operations.StreamOperation[Any]) -> Any:
    return json.loads(operation.request.content or b"null")


def test_a_chat_sends_its_messages_and_options() -> None:
    operation = operations.chat(MESSAGES, {"max_tokens": 3, "temperature": 0.0})
    assert (operation.request.method, operation.request.path) == ("POST", "/v1/chat/completions")
    assert sent(operation) == {"messages": MESSAGES, "max_tokens": 3, "temperature": 0.0}


def test_a_stream_asks_for_events_and_usage() -> None:
    for operation in (operations.stream_chat(MESSAGES, {}), operations.stream_complete("a", {})):
        assert operation.request.accept == "text/event-stream"
        assert sent(operation)["stream"] is True
        assert sent(operation)["stream_options"] == {"include_usage": True}


def test_logits_are_always_asked_for_as_base64() -> None:
    default = {"positions": "generated", "stage": "raw", "dtype": "float32", "encoding": "base64"}
    # True is the whole vocabulary, which the server writes as base64 by itself.
    assert sent(operations.complete("a", {"return_logits": True}))["return_logits"] is True
    assert sent(operations.complete("a", {"return_logits": LogitsSpec()}))["return_logits"] == default
    spec = LogitsSpec(positions="all", top_k=5, dtype="bfloat16")
    assert sent(operations.complete("a", {"return_logits": spec}))["return_logits"] == {
        **default,
        "positions": "all",
        "top_k": 5,
        "dtype": "bfloat16",
    }
    assert sent(operations.complete("a", {"return_logits": False}))["return_logits"] is False


def test_hidden_states_are_always_asked_for_as_base64() -> None:
    default = {"positions": "generated", "dtype": "float32", "encoding": "base64"}
    assert sent(operations.chat(MESSAGES, {"return_hidden_states": True}))["return_hidden_states"] is True
    spec = HiddenStatesSpec(positions="prompt", dtype="float16")
    assert sent(operations.chat(MESSAGES, {"return_hidden_states": spec}))["return_hidden_states"] == {
        **default,
        "positions": "prompt",
        "dtype": "float16",
    }


def test_numpys_numbers_and_arrays_are_sent_as_plain_ones() -> None:
    ids = np.array([3, 4], np.int32)
    operation = operations.complete(
        [ids, ids[:1]], {"stop_token_ids": ids, "return_logits": LogitsSpec(token_ids=ids)}
    )
    assert sent(operation)["prompt"] == [[3, 4], [3]]
    assert sent(operation)["stop_token_ids"] == [3, 4]
    assert sent(operation)["return_logits"]["token_ids"] == [3, 4]
    assert sent(operations.perplexity(ids, {"model": "m"})) == {"input": [3, 4], "model": "m"}


def test_rows_come_as_json_or_as_a_stream_of_arrow() -> None:
    whole = operations.logits("a", None, {"top_k": 3})
    assert (whole.request.path, whole.request.accept) == ("/v1/logits", "application/json")
    assert sent(whole) == {"input": "a", "top_k": 3, "encoding": "base64"}
    stream = operations.stream_logits(None, MESSAGES, {"hidden_states": True})
    assert (stream.request.path, stream.request.accept) == (
        "/v1/logits",
        "application/vnd.apache.arrow.stream",
    )
    assert sent(stream) == {"messages": MESSAGES, "hidden_states": True}


def test_messages_may_stand_for_input() -> None:
    assert sent(operations.rewards(None, MESSAGES, {"head": "h"})) == {"messages": MESSAGES, "head": "h"}
    for given, messages in ((None, None), ("a", MESSAGES)):
        with pytest.raises(TypeError, match="exactly one"):
            operations.rewards(given, messages, {})


def test_pooling_and_tokens_are_asked_for() -> None:
    pooling = operations.pooling(None, MESSAGES, {"head": "h", "cache_salt": "s"})
    assert pooling.request.path == "/pooling"
    assert sent(pooling) == {
        "messages": MESSAGES,
        "head": "h",
        "cache_salt": "s",
        "encoding_format": "base64",
    }
    tokenize = operations.tokenize("a", None, {"return_token_strs": True})
    assert tokenize.request.path == "/tokenize"
    assert sent(tokenize) == {"prompt": "a", "return_token_strs": True}
    assert sent(operations.tokenize(None, MESSAGES, {})) == {"messages": MESSAGES}
    with pytest.raises(TypeError, match="exactly one of prompt and messages"):
        operations.tokenize(None, None, {})
    detokenize = operations.detokenize(np.array([3, 4]), {"model": "m"})
    assert detokenize.request.path == "/detokenize"
    assert sent(detokenize) == {"tokens": [3, 4], "model": "m"}


@pytest.mark.parametrize(
    ("options", "body", "set_by_the_method"),
    [
        (ChatOptions, ChatBody, {"messages", "stream", "stream_options"}),
        (CompletionOptions, CompletionBody, {"prompt", "stream", "stream_options"}),
        (LogitsOptions, LogitsBody, {"input", "messages", "encoding"}),
        (InputOptions, PerplexityBody, {"input"}),
        (RewardOptions, RewardsBody, {"input", "messages"}),
        (EmbeddingOptions, EmbeddingsBody, {"input", "encoding_format"}),
        (PoolingOptions, PoolingBody, {"input", "messages", "encoding_format"}),
        (TokenizeOptions, TokenizeBody, {"prompt", "messages"}),
        (DetokenizeOptions, DetokenizeBody, {"tokens"}),
    ],
)
def test_every_option_of_the_server_is_the_clients(
    options: type, body: type[RequestBody], set_by_the_method: set[str]
) -> None:
    assert set(options.__annotations__) == body.model_fields.keys() - set_by_the_method


def test_the_models_are_got() -> None:
    request = operations.models().request
    assert (request.method, request.path, request.content) == ("GET", "/v1/models", None)


def test_what_json_lacks_is_refused_before_it_is_sent() -> None:
    with pytest.raises(ValueError, match="JSON"):
        sent(operations.chat(MESSAGES, {"temperature": float("nan")}))
    with pytest.raises(TypeError, match="object"):
        sent(operations.complete(cast("str", object()), {}))


def test_a_body_is_as_short_as_its_text() -> None:
    content = operations.complete("寿司", {"max_tokens": 1}).request.content
    assert content == '{"max_tokens":1,"prompt":"寿司"}'.encode()


def test_streaming_is_no_option() -> None:
    with pytest.raises(TypeError, match="stream_chat"):
        operations.chat(MESSAGES, cast("ChatOptions", {"stream": True}))
