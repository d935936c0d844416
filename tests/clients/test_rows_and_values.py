"""The endpoints of our own: rows of an input, and what can be computed from them, against the real app and engine."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from logitclient import (
    AsyncClient,
    BadRequestError,
    Client,
    HiddenStatesSpec,
    LogitsBatch,
    LogitsSpec,
    NotFoundError,
    Rows,
)
from numpy.typing import NDArray

pytestmark = pytest.mark.anyio

VOCABULARY = 49152
HIDDEN = 64
PROMPT = [5, 6, 7, 8, 9]
MESSAGES = [{"role": "user", "content": "Name a colour."}]


async def prompt_rows(client: AsyncClient) -> NDArray[np.float32]:
    """[5, vocabulary], by way of completions."""
    answer = await client.complete(PROMPT, max_tokens=0, return_logits=LogitsSpec(positions="prompt"))
    assert answer.logits is not None
    assert answer.logits.prompt is not None
    return answer.logits.prompt.values


async def prompt_states(client: AsyncClient) -> NDArray[np.float32]:
    """[5, hidden], by way of completions."""
    answer = await client.complete(
        PROMPT, max_tokens=0, return_hidden_states=HiddenStatesSpec(positions="prompt")
    )
    assert answer.hidden_states is not None
    assert answer.hidden_states.prompt is not None
    return answer.hidden_states.prompt.values


async def batches(client: AsyncClient, given: Any = None, **options: Any) -> list[LogitsBatch]:
    async with client.stream_logits(given, **options) as stream:
        return [batch async for batch in stream]


def logprobs(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    return torch.from_numpy(rows.astype(np.float64)).log_softmax(-1).numpy()


def values(rows: Rows | None) -> NDArray[Any]:
    assert rows is not None
    return rows.values


async def test_logits_are_the_prompts_rows(client: AsyncClient) -> None:
    first, second = await client.logits([PROMPT, PROMPT[:2]], hidden_states=True)
    expected = await prompt_rows(client)
    assert first.prompt_token_ids.tolist() == PROMPT
    assert first.token_ids.size == 0
    assert np.array_equal(values(first.logits.prompt), expected)
    assert np.array_equal(values(second.logits.prompt), expected[:2])
    assert first.hidden_states is not None
    assert np.array_equal(values(first.hidden_states.prompt), await prompt_states(client))


async def test_streamed_logits_are_the_same_rows(client: AsyncClient) -> None:
    pytest.importorskip("pyarrow")
    expected = await prompt_rows(client)
    parts = await batches(client, [PROMPT, PROMPT[:2]], hidden_states=True)
    sequence = np.concatenate([part.sequence for part in parts])
    rows = np.concatenate([part.logits.values for part in parts])
    assert np.array_equal(rows[sequence == 0], expected)
    assert np.array_equal(rows[sequence == 1], expected[:2])
    states = np.concatenate([values(part.hidden_states) for part in parts])
    assert np.array_equal(states[sequence == 0], await prompt_states(client))
    position = np.concatenate([part.position for part in parts])
    assert position[sequence == 0].tolist() == [1, 2, 3, 4, 5]
    token_id = np.concatenate([part.token_id for part in parts])
    assert token_id[sequence == 0].tolist() == [*PROMPT[1:], -1]
    found = np.concatenate([part.logprob for part in parts])[sequence == 0]
    assert np.allclose(found[:4], logprobs(expected)[range(4), PROMPT[1:]], rtol=1e-5)
    assert np.isnan(found[4])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("chosen", [{}, {"top_k": 3}, {"token_ids": [33, 5]}])
async def test_arrow_and_json_say_the_same(client: AsyncClient, dtype: Any, chosen: Any) -> None:
    pytest.importorskip("pyarrow")
    (whole,) = await client.logits(PROMPT, dtype=dtype, **chosen)
    parts = await batches(client, PROMPT, dtype=dtype, **chosen)
    rows = whole.logits.prompt
    assert rows is not None
    assert {part.logits.dtype for part in parts} == {rows.dtype} == {dtype}
    assert np.array_equal(np.concatenate([part.logits.values for part in parts]), rows.values)
    ids = [part.logits.token_ids for part in parts if part.logits.token_ids is not None]
    if rows.token_ids is None:
        assert not ids
    else:
        assert np.array_equal(np.concatenate(ids), rows.token_ids)


async def test_generated_rows_stream_step_by_step(client: AsyncClient) -> None:
    pytest.importorskip("pyarrow")
    answer = await client.complete(PROMPT, max_tokens=4, temperature=0, ignore_eos=True, return_logits=True)
    parts = await batches(client, PROMPT, positions="generated", max_tokens=4, temperature=0, ignore_eos=True)
    assert len(parts) == 4
    assert answer.token_ids is not None
    assert [part.token_id.tolist() for part in parts] == [[token] for token in answer.token_ids.tolist()]
    assert [part.position.tolist() for part in parts] == [[5], [6], [7], [8]]
    assert answer.logits is not None
    assert np.array_equal(
        np.concatenate([part.logits.values for part in parts]), values(answer.logits.generated)
    )


async def test_the_bytes_of_an_arrow_stream_are_a_file_of_it(client: AsyncClient) -> None:
    pa = pytest.importorskip("pyarrow")
    options: Any = {"top_k": 3, "dtype": "bfloat16"}
    async with client.stream_arrow(PROMPT, **options) as stream:
        content = b"".join([piece async for piece in stream])
    with pa.ipc.open_stream(content) as reader:
        table = reader.read_all()
    parts = await batches(client, PROMPT, **options)
    assert table.schema.metadata[b"dtype"] == b"bfloat16"
    assert table["position"].to_pylist() == np.concatenate([part.position for part in parts]).tolist()
    ids = np.concatenate([part.logits.token_ids for part in parts if part.logits.token_ids is not None])
    assert table["top_ids"].to_pylist() == ids.tolist()


def test_a_server_process_streams_arrow(url: str) -> None:
    pytest.importorskip("pyarrow")
    with Client(url) as client:
        (whole,) = client.logits(messages=MESSAGES)
        with client.stream_logits(messages=MESSAGES) as stream:
            rows = np.concatenate([batch.logits.values for batch in stream])
        assert np.array_equal(rows, values(whole.logits.prompt))
        with client.stream_logits(PROMPT, positions="all", max_tokens=200, ignore_eos=True) as stream:
            assert next(iter(stream)).logits.values.shape[1] == VOCABULARY
        assert len(client.logits(PROMPT)) == 1


async def test_hidden_states_come_with_generated_tokens(client: AsyncClient) -> None:
    answer = await client.chat(
        MESSAGES,
        max_tokens=3,
        temperature=0,
        ignore_eos=True,
        return_hidden_states=HiddenStatesSpec(dtype="bfloat16"),
    )
    assert answer.hidden_states is not None
    assert answer.hidden_states.generated is not None
    assert answer.hidden_states.generated.values.shape == (3, HIDDEN)
    assert answer.hidden_states.generated.to_torch().dtype == torch.bfloat16


async def test_perplexity_is_what_the_rows_say(client: AsyncClient) -> None:
    first, single = await client.perplexity([PROMPT, [5]])
    expected = -logprobs(await prompt_rows(client))[range(4), PROMPT[1:]].sum()
    assert first.num_tokens == 4
    assert first.nll == pytest.approx(expected, rel=1e-5)
    assert first.perplexity == pytest.approx(np.exp(expected / 4), rel=1e-5)
    assert (single.num_tokens, single.perplexity) == (0, None)


async def test_a_reward_is_the_head_on_the_hidden_states(
    client: AsyncClient, value_head: dict[str, torch.Tensor]
) -> None:
    weight, bias = (tensor.numpy() for tensor in value_head.values())
    expected = (await prompt_states(client)) @ weight[0] + bias
    (found,) = await client.rewards(PROMPT, head="helpful", return_values=True)
    assert found.head == "helpful"
    assert found.values is not None
    assert np.allclose(found.values, expected, rtol=1e-4, atol=1e-4)
    assert found.reward == pytest.approx(float(found.values[-1]))
    (alone,) = await client.rewards(PROMPT)
    assert alone.values is None
    assert alone.reward == found.reward
    with pytest.raises(NotFoundError) as missing:
        await client.rewards(PROMPT, head="another")
    assert missing.value.param == "head"


async def test_an_embedding_is_pooled_from_the_hidden_states(client: AsyncClient) -> None:
    states = await prompt_states(client)
    (last,) = await client.embeddings([PROMPT], pooling="last", normalize=False)
    assert np.array_equal(last.vector, states[-1])
    (mean,) = await client.embeddings(PROMPT)
    assert np.allclose(mean.vector, states.mean(0) / np.linalg.norm(states.mean(0)), atol=1e-5)
    (short,) = await client.embeddings(PROMPT, dimensions=8)
    assert short.vector.shape == (8,)


async def test_pooling_gives_the_heads_last_value(client: AsyncClient) -> None:
    rewards = await client.rewards([PROMPT, PROMPT[:2]])
    pooled = await client.pooling([PROMPT, PROMPT[:2]], head="helpful")
    assert [found.index for found in pooled] == [0, 1]
    assert [found.values.shape for found in pooled] == [(1,), (1,)]
    assert [found.values[0] for found in pooled] == [np.float32(reward.reward) for reward in rewards]
    assert pooled.usage is not None
    assert pooled.usage.prompt_tokens == 7
    (turn,) = await client.pooling(messages=MESSAGES)
    (reward,) = await client.rewards(messages=MESSAGES)
    assert turn.values[0] == np.float32(reward.reward)


def test_pooling_without_heads_gives_the_last_hidden_states(url: str) -> None:
    with Client(url) as client:
        (pooled,) = client.pooling(PROMPT)
        (embedding,) = client.embeddings(PROMPT, pooling="last", normalize=False)
        assert np.array_equal(pooled.values, embedding.vector)
        tokens = client.tokenize("Name a colour.")
        assert client.detokenize(tokens.token_ids) == "Name a colour."


async def test_refusals_of_rows_have_their_types(client: AsyncClient) -> None:
    pytest.importorskip("pyarrow")
    with pytest.raises(BadRequestError) as wide:
        await batches(client, PROMPT, top_k=VOCABULARY + 1)
    assert wide.value.param == "top_k"
    with pytest.raises(BadRequestError):
        await client.embeddings(PROMPT, dimensions=HIDDEN + 1)
