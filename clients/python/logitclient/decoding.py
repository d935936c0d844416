"""Decoders of the API's JSON into results. They read the OpenAI SDK's objects too."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from logitclient.errors import DecodeError
from logitclient.results import (
    Choice,
    Chunk,
    Completion,
    Embedding,
    HiddenStates,
    Logits,
    Model,
    Perplexity,
    Pooling,
    PromptLogprobs,
    Results,
    Reward,
    SequenceLogits,
    TokenLogprob,
    Tokens,
    Usage,
)
from logitclient.rows import decode_block, from_base64

T = TypeVar("T")
C = TypeVar("C", bound=Choice)


@contextlib.contextmanager
def decode_errors(name: str) -> Iterator[None]:
    """Raise DecodeError for JSON that does not have the API's shape. ``name`` says what it should have been."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise DecodeError(f"this is no {name}: {error!r}") from error


def decode_logits(response: object) -> list[Logits | None]:
    """Return the logits of an answer that another package read: one entry for each choice, in their order.

    ``response`` is a chat completion, completion or chunk of the OpenAI SDK, or the same as a plain dict.
    It may be one of their choices: a list of one comes back. A choice without logits has the entry None.
    Raises DecodeError.
    """
    with decode_errors("answer with logits"):
        choices = _member(response, "choices")
        return [_logits(_member(choice, "logits")) for choice in ([response] if choices is None else choices)]


def _member(holder: object, name: str) -> Any:
    return holder.get(name) if isinstance(holder, Mapping) else getattr(holder, name, None)


def _logits(logits: Any) -> Logits | None:
    if logits is None:
        return None
    stage = logits["stage"]
    if stage not in ("raw", "processed"):
        raise DecodeError(f"the stage of logits is {stage!r}")
    # A list has null for -inf and NaN alike. In processed rows a filter put it there, in raw rows it is unknown.
    null = -math.inf if stage == "processed" else math.nan
    generated, prompt = (
        None if logits.get(part) is None else decode_block(logits[part], null=null)
        for part in ("generated", "prompt")
    )
    return Logits(stage, generated, prompt, logits.get("batch_invariant") is not False)


def _hidden_states(states: Any) -> HiddenStates | None:
    if states is None:
        return None
    generated, prompt = (
        None if states.get(part) is None else decode_block(states[part]) for part in ("generated", "prompt")
    )
    return HiddenStates(generated, prompt)


def _token_ids(ids: Any) -> NDArray[np.int32]:
    if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        raise DecodeError("token_ids is no list of integers")
    return np.array(ids, np.int32)


def _usage(usage: Any) -> Usage | None:
    if not usage:
        return None
    details = usage.get("prompt_tokens_details") or {}
    return Usage(
        usage["prompt_tokens"], usage.get("completion_tokens") or 0, details.get("cached_tokens") or 0
    )


def _choice(kind: type[C], choice: dict[str, Any], text: str | None) -> C:
    token_ids = choice.get("token_ids")
    found = kind(
        index=choice["index"],
        text=text or "",
        finish_reason=choice.get("finish_reason"),
        token_ids=None if token_ids is None else _token_ids(token_ids),
        logits=_logits(choice.pop("logits", None)),
        hidden_states=_hidden_states(choice.pop("hidden_states", None)),
        prompt_logprobs=_prompt_logprobs(choice.get("prompt_logprobs")),
        raw=choice,
    )
    rows = found.logits and found.logits.generated
    if rows and found.token_ids is not None and len(rows) != len(found.token_ids):
        raise DecodeError(f"{len(rows)} rows of logits came with {len(found.token_ids)} tokens")
    return found


def _completion(body: dict[str, Any], text_of: Callable[[dict[str, Any]], str | None]) -> Completion:
    choices = tuple(_choice(Choice, choice, text_of(choice)) for choice in body["choices"])
    return Completion(body["id"], body["model"], choices, _usage(body.get("usage")) or Usage(0, 0), body)


def _prompt_logprobs(entries: Any) -> PromptLogprobs | None:
    return None if entries is None else tuple(map(_token_logprobs, entries))


def _token_logprobs(entry: Any) -> dict[int, TokenLogprob] | None:
    if entry is None:
        return None
    return {
        int(token_id): TokenLogprob(token["logprob"], token["rank"], token["decoded_token"])
        for token_id, token in entry.items()
    }


def chat_completion(body: dict[str, Any]) -> Completion:
    _copy_prompt(body)
    return _completion(body, lambda choice: choice["message"]["content"])


def text_completion(body: dict[str, Any]) -> Completion:
    return _completion(body, lambda choice: choice["text"])


def chat_chunks(body: dict[str, Any]) -> list[Chunk]:
    _copy_prompt(body)
    return [_choice(Chunk, choice, choice["delta"].get("content")) for choice in body["choices"]]


def text_chunks(body: dict[str, Any]) -> list[Chunk]:
    return [_choice(Chunk, choice, choice["text"]) for choice in body["choices"]]


def _copy_prompt(body: dict[str, Any]) -> None:
    """Copy what belongs to the prompt into the first choice. A chat has it beside its choices, completions in them."""
    for name in ("prompt_logprobs", "prompt_token_ids"):
        if body["choices"] and name in body:
            body["choices"][0][name] = body[name]


def chunk_usage(body: dict[str, Any]) -> Usage | None:
    return _usage(body.get("usage"))


def _results(body: dict[str, Any], entry: Callable[[dict[str, Any]], T]) -> Results[T]:
    data = tuple(map(entry, body["data"]))
    return Results(data, body.get("model"), _usage(body.get("usage")), body)


def logits(body: dict[str, Any]) -> Results[SequenceLogits]:
    return _results(body, _sequence_logits)


def _sequence_logits(entry: dict[str, Any]) -> SequenceLogits:
    found = _logits(entry.pop("logits"))
    if found is None:
        raise DecodeError("an entry has no logits")
    return SequenceLogits(
        index=entry["index"],
        prompt_token_ids=_token_ids(entry["prompt_token_ids"]),
        token_ids=_token_ids(entry["token_ids"]),
        logits=found,
        hidden_states=_hidden_states(entry.pop("hidden_states", None)),
        finish_reason=entry.get("finish_reason"),
    )


def perplexities(body: dict[str, Any]) -> Results[Perplexity]:
    return _results(
        body,
        lambda entry: Perplexity(entry["index"], entry["nll"], entry["num_tokens"], entry["perplexity"]),
    )


def rewards(body: dict[str, Any]) -> Results[Reward]:
    head = body["head"]

    def reward(entry: dict[str, Any]) -> Reward:
        values = entry.get("values")
        return Reward(
            entry["index"], head, _numbers(entry["reward"]), None if values is None else _numbers(values)
        )

    return _results(body, reward)


def _numbers(value: Any) -> NDArray[np.float64]:
    """Return a number or nested lists of numbers as an array. A null is NaN."""
    return np.asarray(value, np.float64)


def embeddings(body: dict[str, Any]) -> Results[Embedding]:
    return _results(body, lambda entry: Embedding(entry["index"], _vector(entry.pop("embedding"))))


def poolings(body: dict[str, Any]) -> Results[Pooling]:
    return _results(body, lambda entry: Pooling(entry["index"], _vector(entry.pop("data"))))


def _vector(data: str) -> NDArray[np.float32]:
    # The width is not sent. Four characters of base64 are three bytes, less the padding.
    width = (len(data) * 3 // 4 - data.count("=")) // 4
    return from_base64(data, "float32", (width,))


def tokens(body: dict[str, Any]) -> Tokens:
    strings = body.get("token_strs")
    return Tokens(
        _token_ids(body["tokens"]), None if strings is None else tuple(strings), body["max_model_len"]
    )


def prompt_text(body: dict[str, Any]) -> str:
    text: str = body["prompt"]
    return text


def models(body: dict[str, Any]) -> Results[Model]:
    return _results(
        body,
        lambda entry: Model(
            entry["id"],
            entry.get("vocab_size"),
            entry.get("max_model_len"),
            entry.get("batch_invariant"),
            entry,
        ),
    )
