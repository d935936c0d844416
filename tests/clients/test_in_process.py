"""The async client against the real app and engine, in this process over ASGI."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from fastapi import FastAPI
from logitclient import (
    AsyncClient,
    AuthenticationError,
    BadRequestError,
    Logits,
    LogitsSpec,
    NotFoundError,
    PayloadTooLargeError,
    Rows,
)
from numpy.typing import NDArray

pytestmark = pytest.mark.anyio

VOCABULARY = 49152
PROMPT = [5, 6, 7, 8, 9]
MESSAGES = [{"role": "user", "content": "Name a colour."}]


def generated(logits: Logits | None) -> Rows:
    assert logits is not None
    assert logits.generated is not None
    return logits.generated


def ids(token_ids: NDArray[np.int32] | None) -> list[int]:
    assert token_ids is not None
    return [int(token) for token in token_ids]


async def test_a_chat_brings_the_rows_that_its_tokens_were_drawn_from(client: AsyncClient) -> None:
    answer = await client.chat(MESSAGES, max_tokens=4, temperature=0, ignore_eos=True, return_logits=True)
    rows = generated(answer.logits)
    assert rows.values.shape == (4, VOCABULARY)
    assert rows.values.argmax(axis=1).tolist() == ids(answer.token_ids)
    assert rows.dtype == "float32"
    assert answer.finish_reason == "length"
    assert answer.usage.completion_tokens == 4
    assert answer.model == "tiny"
    assert np.array_equal(rows.to_torch().numpy(), rows.values)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
async def test_smaller_dtypes_round_the_same_rows(client: AsyncClient, dtype: Any) -> None:
    async def ask(spec: LogitsSpec) -> torch.Tensor:
        answer = await client.complete(PROMPT, max_tokens=2, temperature=0, return_logits=spec)
        return generated(answer.logits).to_torch()

    tensor = await ask(LogitsSpec(dtype=dtype))
    assert tensor.dtype == getattr(torch, dtype)
    assert torch.equal(tensor, (await ask(LogitsSpec())).to(tensor.dtype))


async def test_prompt_rows_end_where_generated_rows_begin(client: AsyncClient) -> None:
    answer = await client.complete(
        PROMPT, max_tokens=2, temperature=0, return_logits=LogitsSpec(positions="all")
    )
    assert answer.logits is not None
    assert answer.logits.prompt is not None
    assert answer.logits.prompt.offset == 0
    assert len(answer.logits.prompt) == len(PROMPT)
    assert np.array_equal(answer.logits.prompt.values[-1], generated(answer.logits).values[0])
    alone = await client.complete(PROMPT, max_tokens=0, return_logits=LogitsSpec(positions="prompt"))
    assert alone.logits is not None
    assert alone.logits.generated is None
    assert alone.logits.prompt is not None
    assert np.array_equal(alone.logits.prompt.values, answer.logits.prompt.values)


async def test_chosen_columns_are_those_of_the_whole_row(client: AsyncClient) -> None:
    async def ask(spec: LogitsSpec) -> Rows:
        answer = await client.complete(PROMPT, max_tokens=3, temperature=0, return_logits=spec)
        return generated(answer.logits)

    whole = (await ask(LogitsSpec())).values
    top = await ask(LogitsSpec(top_k=4))
    assert top.token_ids is not None
    assert top.token_ids.shape == top.values.shape == (3, 4)
    assert np.array_equal(np.take_along_axis(whole, top.token_ids, axis=1), top.values)
    assert np.array_equal(top.values, -np.sort(-whole, axis=1)[:, :4])
    named = await ask(LogitsSpec(token_ids=np.array([33, 5])))
    assert named.token_ids is not None
    assert named.token_ids.tolist() == [[33, 5]] * 3
    assert np.array_equal(named.values, whole[:, [33, 5]])


async def test_processed_rows_show_what_was_filtered(client: AsyncClient) -> None:
    answer = await client.complete(
        PROMPT, max_tokens=1, temperature=0.5, top_k=2, seed=1, return_logits=LogitsSpec(stage="processed")
    )
    assert answer.logits is not None
    assert answer.logits.stage == "processed"
    assert np.isfinite(generated(answer.logits).values).sum() == 2


async def test_a_stream_brings_the_whole_answer_in_parts(client: AsyncClient) -> None:
    whole = await client.complete(PROMPT, max_tokens=5, n=2, seed=3, ignore_eos=True, return_logits=True)
    text, tokens, rows = ["", ""], [[], []], [[], []]  # type: tuple[list[str], list[list[int]], list[list[Any]]]
    async with client.stream_complete(
        PROMPT, max_tokens=5, n=2, seed=3, ignore_eos=True, return_logits=True
    ) as stream:
        async for chunk in stream:
            text[chunk.index] += chunk.text
            tokens[chunk.index] += ids(chunk.token_ids)
            if chunk.logits and chunk.logits.generated:
                rows[chunk.index].append(chunk.logits.generated.values)
    assert stream.usage == whole.usage
    for choice in whole.choices:
        assert text[choice.index] == choice.text
        assert tokens[choice.index] == ids(choice.token_ids)
        assert np.array_equal(np.concatenate(rows[choice.index]), generated(choice.logits).values)


@pytest.mark.parametrize("top", [0, 2])
async def test_prompt_logprobs_stream_as_the_whole_answer_has_them(client: AsyncClient, top: int) -> None:
    whole = await client.complete(PROMPT, max_tokens=2, n=2, seed=3, prompt_logprobs=top)
    async with client.stream_complete(PROMPT, max_tokens=2, n=2, seed=3, prompt_logprobs=top) as stream:
        chunks = [chunk async for chunk in stream]
    entries = [entry for chunk in chunks for entry in chunk.prompt_logprobs or ()]
    assert whole.prompt_logprobs == tuple(entries)
    first, *scored = entries
    assert first is None
    assert len(scored) == len(PROMPT) - 1
    for entry, token in zip(scored, PROMPT[1:], strict=True):
        assert entry is not None
        assert len(entry) in {top, top + 1}
        assert entry[token].rank >= 1
        assert entry[token].logprob < 0
    assert whole.choices[1].prompt_logprobs is None


async def test_a_chats_prompt_logprobs_stream_too(client: AsyncClient) -> None:
    whole = await client.chat(MESSAGES, max_tokens=2, seed=3, prompt_logprobs=1)
    assert whole.prompt_logprobs is not None
    assert len(whole.prompt_logprobs) == whole.usage.prompt_tokens
    async with client.stream_chat(MESSAGES, max_tokens=2, seed=3, prompt_logprobs=1) as stream:
        chunks = [chunk async for chunk in stream]
    assert tuple(entry for chunk in chunks for entry in chunk.prompt_logprobs or ()) == whole.prompt_logprobs


async def test_a_prompts_tokens_and_their_text(client: AsyncClient) -> None:
    tokens = await client.tokenize("Name a colour.", return_token_strs=True)
    assert len(tokens) == len(tokens.token_ids) > 0
    assert tokens.token_ids.dtype == np.int32
    assert tokens.token_strs is not None
    assert len(tokens.token_strs) == len(tokens)
    assert tokens.max_model_len == 512
    assert await client.detokenize(tokens.token_ids) == "Name a colour."
    turn = await client.tokenize(messages=MESSAGES)
    assert turn.token_strs is None
    assert "Name a colour." in await client.detokenize(turn.token_ids.tolist())
    answer = await client.chat(MESSAGES, max_tokens=1)
    assert len(turn) == answer.usage.prompt_tokens


async def test_a_cache_salt_keeps_prefixes_apart(client: AsyncClient) -> None:
    prompt = list(range(100, 164))

    async def cached(salt: str) -> int:
        answer = await client.complete(prompt, max_tokens=1, cache_salt=salt)
        return answer.usage.cached_tokens

    assert await cached("one") == 0
    assert await cached("one") > 0
    assert await cached("two") == 0


@pytest.mark.parametrize(
    "name", ["complete", "chat", "logits", "perplexity", "rewards", "embeddings", "pooling"]
)
async def test_a_cache_salt_reaches_every_endpoint_that_reads_a_prompt(
    client: AsyncClient, name: str
) -> None:
    given: Any = MESSAGES if name == "chat" else PROMPT
    with pytest.raises(BadRequestError) as refused:
        await getattr(client, name)(given, cache_salt="")
    assert refused.value.param == "cache_salt"


async def test_several_prompts_are_several_choices(client: AsyncClient) -> None:
    answer = await client.complete(["1 2 3", "a b c"], max_tokens=2, temperature=0, return_token_ids=True)
    alone = [
        await client.complete(prompt, max_tokens=2, temperature=0, return_token_ids=True)
        for prompt in ("1 2 3", "a b c")
    ]
    assert [ids(choice.token_ids) for choice in answer.choices] == [ids(one.token_ids) for one in alone]


async def test_calls_run_at_once(client: AsyncClient) -> None:
    async def ask(token: int) -> list[int]:
        answer = await client.complete([token, 8], max_tokens=3, temperature=0, return_token_ids=True)
        return ids(answer.token_ids)

    alone = [await ask(token) for token in range(4)]
    assert await asyncio.gather(*map(ask, range(4))) == alone


async def test_the_model_is_described(client: AsyncClient) -> None:
    (model,) = await client.models()
    assert (model.id, model.vocab_size, model.max_model_len) == ("tiny", VOCABULARY, 512)
    assert model.raw["dtype"] == "float32"


async def test_refusals_have_their_types(client: AsyncClient) -> None:
    with pytest.raises(BadRequestError) as bad:
        await client.chat(MESSAGES, temperature=3)
    assert bad.value.param == "temperature"
    assert bad.value.request_id
    with pytest.raises(BadRequestError) as wide:
        await client.complete(PROMPT, return_logits=LogitsSpec(top_k=VOCABULARY + 1))
    assert wide.value.param == "return_logits.top_k"
    with pytest.raises(NotFoundError) as missing:
        await client.chat(MESSAGES, model="another")
    assert missing.value.code == "model_not_found"
    with pytest.raises(PayloadTooLargeError):
        await client.complete("a" * (1 << 16))
    with pytest.raises(BadRequestError):
        async with client.stream_chat(MESSAGES, max_tokens=9000):
            pass


async def test_a_wrong_key_is_told(app: FastAPI) -> None:
    for key in (None, "wrong"):
        async with AsyncClient(transport=httpx.ASGITransport(app), api_key=key) as stranger:
            with pytest.raises(AuthenticationError):
                await stranger.models()
