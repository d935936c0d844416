"""Both clients, and the OpenAI SDK with ``decode_logits``, against a server process."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from logitclient import AsyncClient, Client, Logits, LogitsSpec, Rows, TransportError, decode_logits
from numpy.typing import NDArray
from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam

PROMPT = [5, 6, 7, 8, 9]
MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Name a colour."}]


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[Client]:
    with Client(url, max_retries=0) as client:
        yield client


def generated(logits: Logits | None) -> Rows:
    assert logits is not None
    assert logits.generated is not None
    return logits.generated


def joined(parts: list[Logits | None]) -> NDArray[np.float32]:
    """All generated rows of a stream."""
    rows = [part.generated.values for part in parts if part is not None and part.generated is not None]
    assert len(rows) > 1
    return np.concatenate(rows)


@pytest.fixture(scope="module")
def whole(client: Client) -> NDArray[np.float32]:
    """The rows of one chat, from an answer in one piece."""
    answer = client.chat(list(MESSAGES), max_tokens=6, temperature=0, ignore_eos=True, return_logits=True)
    assert len(generated(answer.logits)) == 6
    return generated(answer.logits).values


def test_a_streams_rows_are_the_answers(client: Client, whole: NDArray[np.float32]) -> None:
    with client.stream_chat(
        list(MESSAGES), max_tokens=6, temperature=0, ignore_eos=True, return_logits=True
    ) as stream:
        chunks = list(stream)
    for chunk in chunks:
        assert chunk.token_ids is not None
        assert generated(chunk.logits).values.argmax(axis=1).tolist() == chunk.token_ids.tolist()
    assert np.array_equal(joined([chunk.logits for chunk in chunks]), whole)
    assert chunks[-1].finish_reason == "length"
    assert stream.usage is not None
    assert stream.usage.completion_tokens == 6


@pytest.mark.anyio
async def test_the_async_client_reads_the_same(url: str, whole: NDArray[np.float32]) -> None:
    async with (
        AsyncClient(url) as async_client,
        async_client.stream_chat(
            list(MESSAGES), max_tokens=6, temperature=0, ignore_eos=True, return_logits=True
        ) as stream,
    ):
        parts = [chunk.logits async for chunk in stream]
    assert np.array_equal(joined(parts), whole)


def test_prompt_rows_stream_before_the_first_token(client: Client) -> None:
    spec = LogitsSpec(positions="all", top_k=3)
    answer = client.complete(PROMPT, max_tokens=2, temperature=0, return_logits=spec)
    with client.stream_complete(PROMPT, max_tokens=2, temperature=0, return_logits=spec) as stream:
        parts = [chunk.logits for chunk in stream]
    prompts = [part.prompt for part in parts if part is not None and part.prompt is not None]
    assert parts[0] is not None
    assert parts[0].prompt is prompts[0]
    assert prompts[0].offset == 0
    assert answer.logits is not None
    assert answer.logits.prompt is not None
    assert np.array_equal(np.concatenate([rows.values for rows in prompts]), answer.logits.prompt.values)


def test_the_client_is_usable_after_a_stream_was_left_early(client: Client) -> None:
    with client.stream_complete(PROMPT, max_tokens=400, ignore_eos=True, return_logits=True) as stream:
        next(iter(stream))
    assert client.complete(PROMPT, max_tokens=1).usage.completion_tokens == 1


@pytest.mark.parametrize("spec", [{}, {"top_k": 5}, {"top_k": 5, "encoding": "base64", "dtype": "bfloat16"}])
def test_the_openai_sdks_answers_are_decoded(
    url: str, spec: dict[str, object], whole: NDArray[np.float32]
) -> None:
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as openai:
        answer = openai.chat.completions.create(
            model="tiny",
            messages=MESSAGES,
            max_tokens=6,
            temperature=0,
            extra_body={"return_logits": spec or True, "ignore_eos": True},
        )
        stream = openai.chat.completions.create(
            model="tiny",
            messages=MESSAGES,
            max_tokens=6,
            temperature=0,
            stream=True,
            extra_body={"return_logits": spec or True, "ignore_eos": True},
        )
        streamed = [logits for chunk in stream for logits in decode_logits(chunk)]
    (logits,) = decode_logits(answer)
    rows = generated(logits)
    if rows.token_ids is None:
        assert np.array_equal(rows.values, whole)
    else:
        exact = np.take_along_axis(whole, rows.token_ids, axis=1)
        assert np.allclose(rows.values, exact, rtol=2**-8 if rows.dtype == "bfloat16" else 0)
    assert np.array_equal(joined(streamed), rows.values)


def test_nobody_at_an_address_is_a_transport_error() -> None:
    with Client("http://127.0.0.1:1") as nobody, pytest.raises(TransportError):
        nobody.models()
