"""Chunks of text out of bytes."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from logitclient import DecodeError, StreamError, TokenLogprob, operations
from logitclient.results import Chunk

ROW = np.array([[1.0, 2.0]], np.float32)
BLOCK = {
    "shape": [1, 2],
    "dtype": "float32",
    "encoding": "base64",
    "data": base64.b64encode(ROW.tobytes()).decode(),
}


def event(body: Any) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def chunk(content: str, token: int, finish_reason: str | None = None) -> bytes:
    choice = {
        "index": 0,
        "delta": {"content": content},
        "finish_reason": finish_reason,
        "token_ids": [token],
        "logits": {"stage": "raw", "generated": BLOCK},
    }
    return event({"choices": [choice], "usage": None})


OPENING = event(
    {
        "choices": [
            {
                "index": 0,
                "delta": {"role": "assistant", "content": ""},
                "token_ids": [],
                "logits": {"stage": "raw"},
            }
        ]
    }
)
USAGE = event({"choices": [], "usage": {"prompt_tokens": 2, "completion_tokens": 2}})
DONE = b"data: [DONE]\n\n"
WHOLE = OPENING + chunk("é", 1) + chunk("b", 2, "stop") + USAGE + DONE


def read(pieces: list[bytes]) -> list[Chunk]:
    decoder = operations.stream_chat([], {}).decoder()
    chunks = [part for piece in pieces for part in decoder.feed(piece)]
    decoder.finish()
    assert decoder.usage is not None
    assert decoder.usage.completion_tokens == 2
    return chunks


@settings(deadline=None, max_examples=30)
@given(st.integers(1, len(WHOLE)))
def test_chunks_carry_text_and_rows_in_any_pieces(size: int) -> None:
    first, second = read([WHOLE[start : start + size] for start in range(0, len(WHOLE), size)])
    assert (first.text, second.text) == ("é", "b")
    assert (first.finish_reason, second.finish_reason) == (None, "stop")
    for part, token in ((first, 1), (second, 2)):
        assert part.token_ids is not None
        assert part.token_ids.tolist() == [token]
        assert part.logits is not None
        assert part.logits.generated is not None
        assert np.array_equal(part.logits.generated.values, ROW)


def test_prompt_rows_come_before_the_first_token() -> None:
    choice = {
        "index": 0,
        "text": "",
        "finish_reason": None,
        "token_ids": [],
        "logits": {"stage": "raw", "prompt": {**BLOCK, "offset": 7}},
    }
    decoder = operations.stream_complete("", {}).decoder()
    (part,) = decoder.feed(event({"choices": [choice]}))
    assert part.logits is not None
    assert part.logits.prompt is not None
    assert part.logits.prompt.offset == 7


ENTRY = {"5": {"logprob": -0.5, "rank": 1, "decoded_token": "a"}}


@pytest.mark.parametrize("where", ["chat", "completions"])
def test_a_chunk_with_prompt_logprobs_alone_is_kept(where: str) -> None:
    choice: dict[str, Any] = {"index": 0, "finish_reason": None, "logprobs": None}
    entries = [None, ENTRY]
    if where == "chat":
        decoder = operations.stream_chat([], {}).decoder()
        body: Any = {"choices": [{**choice, "delta": {}}], "prompt_logprobs": entries}
    else:
        decoder = operations.stream_complete("", {}).decoder()
        body = {"choices": [{**choice, "text": "", "prompt_logprobs": entries}]}
    (part,) = decoder.feed(event(body))
    assert part.prompt_logprobs == (None, {5: TokenLogprob(-0.5, 1, "a")})


def test_a_chunk_with_the_logprobs_of_half_a_character_is_kept() -> None:
    logprobs = {"content": [{"token": "bytes:\\xe2", "logprob": -1.0, "bytes": [226], "top_logprobs": []}]}
    choice = {"index": 0, "delta": {}, "logprobs": logprobs, "finish_reason": None}
    (part,) = operations.stream_chat([], {}).decoder().feed(event({"choices": [choice]}))
    assert part.raw["logprobs"] == logprobs


def test_an_error_in_the_stream_is_raised_with_its_members() -> None:
    decoder = operations.stream_chat([], {}).decoder()
    error = {"message": "The engine died.", "type": "server_error", "param": None, "code": "engine_dead"}
    with pytest.raises(StreamError, match=r"The engine died\.") as caught:
        decoder.feed(OPENING + event({"error": error}))
    assert (caught.value.type, caught.value.code, caught.value.param) == ("server_error", "engine_dead", None)


def test_a_stream_without_its_end_marker_was_cut_off() -> None:
    decoder = operations.stream_chat([], {}).decoder()
    decoder.feed(chunk("a", 1, "stop"))
    with pytest.raises(StreamError, match="DONE"):
        decoder.finish()


@pytest.mark.parametrize(
    "body", [b"data: {\n\n", b"data: []\n\n", b"data: {}\n\n", b'data: {"choices": [3]}\n\n']
)
def test_what_is_no_chunk_is_a_decode_error(body: bytes) -> None:
    with pytest.raises(DecodeError):
        operations.stream_chat([], {}).decoder().feed(body)


def test_the_prompts_ids_of_a_chat_are_in_its_first_chunk() -> None:
    opening = {"index": 0, "delta": {"role": "assistant", "content": ""}}
    (first, _) = read(
        [event({"choices": [opening], "prompt_token_ids": [5, 7]}), chunk("a", 1, "stop"), USAGE, DONE]
    )
    assert first.raw["prompt_token_ids"] == [5, 7]
