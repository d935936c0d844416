"""The openai Python package against the real server."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from numpy.typing import NDArray
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletionMessageParam

MODEL = "smollm2"
VOCABULARY = 49152
MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Name three colours."}]


@pytest.fixture(scope="module")
def client(server_url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server_url}/v1", api_key="none", max_retries=0) as client:
        yield client


def extra(choice: Any, name: str) -> Any:
    """Return a field that OpenAI's API lacks, as the package gives it."""
    return choice.model_extra[name]


def rows_of(block: dict[str, Any]) -> NDArray[Any]:
    data = np.frombuffer(base64.b64decode(block["data"]), dtype=block["dtype"])
    return data.reshape(block["shape"])


def test_a_chat_has_text_usage_and_a_reason_to_end(client: OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=8, temperature=0)
    assert answer.object == "chat.completion"
    assert answer.model == MODEL
    choice = answer.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8


def test_a_streamed_chat_joins_to_the_whole_one(client: OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=12, temperature=0)
    stream = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        max_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    *told, last = chunks
    assert told[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in told) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in told] == [None] * (len(told) - 1) + ["length"]
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 12
    assert all(chunk.usage is None for chunk in told)
    assert len({chunk.id for chunk in chunks}) == 1


def test_chat_logprobs_hold_the_tokens_and_their_rivals(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=5, temperature=0, logprobs=True, top_logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert "".join(entry.token for entry in logprobs.content) == answer.choices[0].message.content
    for entry in logprobs.content:
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].token == entry.token
        assert entry.logprob == entry.top_logprobs[0].logprob <= 0
        assert bytes(entry.bytes or []).decode() == entry.token


def test_streamed_logprobs_equal_the_whole_ones(client: OpenAI) -> None:
    whole = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=6, temperature=0, logprobs=True, top_logprobs=2
    )
    stream = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        max_tokens=6,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
        stream=True,
    )
    told = [chunk.choices[0].logprobs for chunk in stream]
    entries = [entry for logprobs in told if logprobs for entry in logprobs.content or []]
    assert whole.choices[0].logprobs is not None
    assert entries == whole.choices[0].logprobs.content


def test_n_choices_with_a_seed_differ_from_each_other_and_repeat(client: OpenAI) -> None:
    def texts() -> list[str | None]:
        answer = client.chat.completions.create(
            model=MODEL, messages=MESSAGES, max_tokens=12, temperature=1.5, n=4, seed=7
        )
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert answer.usage is not None
        assert answer.usage.completion_tokens <= 48
        return [choice.message.content for choice in answer.choices]

    first = texts()
    assert len(set(first)) > 1
    assert texts() == first


def test_without_a_seed_answers_differ(client: OpenAI) -> None:
    answers = client.completions.create(
        model=MODEL, prompt=["Once upon a time"] * 3, max_tokens=24, temperature=1.5
    )
    assert len({choice.text for choice in answers.choices}) > 1


def test_a_stop_string_ends_the_text_before_itself(client: OpenAI) -> None:
    full = client.completions.create(model=MODEL, prompt="1 2 3 4 5", max_tokens=16, temperature=0)
    assert "7" in full.choices[0].text
    cut = client.completions.create(
        model=MODEL, prompt="1 2 3 4 5", max_tokens=16, temperature=0, stop=[" 7", "zebra"]
    )
    assert cut.choices[0].text == full.choices[0].text.split(" 7")[0]
    assert cut.choices[0].finish_reason == "stop"
    assert extra(cut.choices[0], "stop_reason") == " 7"


def test_a_stop_string_is_held_back_from_a_stream(client: OpenAI) -> None:
    whole = client.completions.create(
        model=MODEL, prompt="1 2 3 4 5", max_tokens=16, temperature=0, stop="6 7"
    )
    stream = client.completions.create(
        model=MODEL, prompt="1 2 3 4 5", max_tokens=16, temperature=0, stop="6 7", stream=True
    )
    chunks = [chunk.choices[0] for chunk in stream]
    assert "".join(chunk.text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].finish_reason == "stop"


def test_echo_gives_the_logprobs_of_the_prompt(client: OpenAI) -> None:
    prompt = "The capital of France is"
    answer = client.completions.create(
        model=MODEL, prompt=prompt, max_tokens=2, temperature=0, echo=True, logprobs=2
    )
    choice = answer.choices[0]
    assert choice.text.startswith(prompt)
    logprobs = choice.logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.text_offset is not None
    assert "".join(logprobs.tokens) == choice.text
    assert logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        assert choice.text[offset : offset + len(token)] == token


def test_a_streamed_echo_joins_to_the_whole_one(client: OpenAI) -> None:
    whole = client.completions.create(
        model=MODEL, prompt="The capital of France is", max_tokens=3, temperature=0, echo=True, logprobs=1
    )
    stream = client.completions.create(
        model=MODEL,
        prompt="The capital of France is",
        max_tokens=3,
        temperature=0,
        echo=True,
        logprobs=1,
        stream=True,
    )
    chunks = [chunk.choices[0] for chunk in stream]
    assert "".join(chunk.text for chunk in chunks) == whole.choices[0].text
    for name in ("tokens", "token_logprobs", "text_offset"):
        pieces = [getattr(chunk.logprobs, name) for chunk in chunks if chunk.logprobs]
        assert [entry for piece in pieces for entry in piece] == getattr(whole.choices[0].logprobs, name)


def test_echo_alone_answers_with_the_prompt(client: OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="Hello there", max_tokens=0, echo=True)
    assert answer.choices[0].text == "Hello there"
    assert answer.choices[0].finish_reason == "length"


def test_prompts_may_be_tokens_and_many(client: OpenAI, server_url: str) -> None:
    prompts = ["1 2 3 4", "The capital of France is"]
    tokens = [
        httpx.post(f"{server_url}/tokenize", json={"prompt": prompt}).json()["tokens"] for prompt in prompts
    ]
    by_text = client.completions.create(model=MODEL, prompt=prompts, max_tokens=4, temperature=0, n=2)
    by_tokens = client.completions.create(model=MODEL, prompt=tokens, max_tokens=4, temperature=0, n=2)
    texts = [choice.text for choice in by_text.choices]
    assert [choice.index for choice in by_text.choices] == [0, 1, 2, 3]
    assert texts == [choice.text for choice in by_tokens.choices]
    assert texts[0] == texts[1] != texts[2] == texts[3]
    stream = client.completions.create(
        model=MODEL, prompt=prompts, max_tokens=4, temperature=0, n=2, stream=True
    )
    streamed = [""] * 4
    for chunk in stream:
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == texts


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_full_logits_are_the_distribution_that_was_drawn_from(client: OpenAI, dtype: str) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        max_tokens=4,
        temperature=0,
        extra_body={"return_logits": {"dtype": dtype}},
    )
    choice = answer.choices[0]
    rows = rows_of(extra(choice, "logits")["generated"])
    assert rows.shape == (4, VOCABULARY)
    assert extra(choice, "logits")["stage"] == "raw"
    assert rows.argmax(axis=1).tolist() == extra(choice, "token_ids")


def test_streamed_logits_hold_exactly_their_chunks_tokens(client: OpenAI) -> None:
    def ask(*, stream: bool) -> Any:
        return client.chat.completions.create(
            model=MODEL,
            messages=MESSAGES,
            max_tokens=5,
            temperature=0,
            n=2,
            stream=stream,
            extra_body={"return_logits": True},
        )

    rows: list[list[NDArray[Any]]] = [[], []]
    ids: list[list[int]] = [[], []]
    for chunk in ask(stream=True):
        choice = chunk.choices[0]
        if choice.delta.role is not None:
            assert choice.model_extra == {}
            continue
        block = rows_of(extra(choice, "logits")["generated"])
        assert len(block) == len(extra(choice, "token_ids"))
        rows[choice.index].append(block)
        ids[choice.index] += extra(choice, "token_ids")
    for choice in ask(stream=False).choices:
        assert ids[choice.index] == extra(choice, "token_ids")
        assert np.array_equal(
            np.concatenate(rows[choice.index]), rows_of(extra(choice, "logits")["generated"])
        )


def test_chosen_columns_equal_the_full_row(client: OpenAI) -> None:
    def ask(spec: dict[str, Any]) -> dict[str, Any]:
        answer = client.completions.create(
            model=MODEL, prompt="1 2 3", max_tokens=2, temperature=0, extra_body={"return_logits": spec}
        )
        block: dict[str, Any] = extra(answer.choices[0], "logits")["generated"]
        return block

    full = rows_of(ask({}))
    top = ask({"top_k": 3})
    assert top["token_ids"] == np.argsort(-full, axis=1)[:, :3].tolist()
    assert np.array_equal(
        np.float32(top["values"]), np.take_along_axis(full, np.array(top["token_ids"]), axis=1)
    )
    named = ask({"token_ids": [33, 5], "encoding": "base64"})
    values = np.frombuffer(base64.b64decode(named["values"]), "<f4").reshape(named["shape"])
    assert np.frombuffer(base64.b64decode(named["token_ids"]), "<i4").tolist() == [33, 5, 33, 5]
    assert np.array_equal(values, full[:, [33, 5]])
    bfloat = ask({"token_ids": [33], "dtype": "bfloat16"})
    assert np.allclose(bfloat["values"], full[:, [33]], rtol=2**-8)


def test_processed_logits_show_the_filters_as_null(client: OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL,
        prompt="1 2 3",
        max_tokens=1,
        temperature=0.5,
        seed=1,
        extra_body={"top_k": 2, "return_logits": {"stage": "processed", "encoding": "list"}},
    )
    (row,) = extra(answer.choices[0], "logits")["generated"]["data"]
    assert len(row) == VOCABULARY
    assert sum(value is not None for value in row) == 2


def test_prompt_rows_come_with_their_offset(client: OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL,
        prompt="The capital of France is",
        max_tokens=1,
        temperature=0,
        extra_body={"return_logits": {"positions": "all"}, "prompt_logprobs": 1},
    )
    logits = extra(answer.choices[0], "logits")
    prompt, generated = rows_of(logits["prompt"]), rows_of(logits["generated"])
    assert logits["prompt"]["offset"] == 0
    assert answer.usage is not None
    assert len(prompt) == answer.usage.prompt_tokens
    assert np.array_equal(prompt[-1], generated[0])
    scores = extra(answer.choices[0], "prompt_logprobs")
    assert scores[0] is None
    assert len(scores) == len(prompt)


def test_a_bias_forbids_and_forces(client: OpenAI, server_url: str) -> None:
    (wanted,) = httpx.post(f"{server_url}/tokenize", json={"prompt": " zebra"}).json()["tokens"][:1]
    answer = client.completions.create(
        model=MODEL,
        prompt="Hello",
        max_tokens=2,
        temperature=0,
        logit_bias={str(wanted): 100},
        extra_body={"return_token_ids": True},
    )
    assert extra(answer.choices[0], "token_ids") == [wanted, wanted]


def test_errors_are_the_packages_own(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=3)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-9", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=9000, stream=True)


def test_models_are_listed_with_what_a_reader_of_logits_needs(client: OpenAI) -> None:
    (listed,) = client.models.list().data
    assert listed.id == MODEL
    assert client.models.retrieve(MODEL) == listed
    described = listed.model_extra or {}
    assert described["vocab_size"] == VOCABULARY
    assert described.keys() >= {"max_model_len", "dtype", "kernels", "batch_invariant"}


@pytest.mark.anyio
async def test_the_async_client_streams_many_at_once(server_url: str) -> None:
    async with AsyncOpenAI(base_url=f"{server_url}/v1", api_key="none", max_retries=0) as client:

        async def ask(number: int) -> str:
            stream = await client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": f"Count from {number}."}],
                max_tokens=6,
                temperature=0,
                stream=True,
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        alone = [await ask(number) for number in range(4)]
        assert await asyncio.gather(*(ask(number) for number in range(4))) == alone
