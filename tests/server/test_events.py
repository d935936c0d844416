"""Events of a stream, fit for clients that read lines: none is too long, and none holds a line break."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import pytest
from logitengine.link.messages import (
    Array,
    GenerationRequest,
    LogitsRows,
    Logprobs,
    PromptOutput,
    StepOutput,
)
from logitserve.answers.choices import LONGEST_EVENT
from scripted_engine import App, OpenApp, Script, Step

pytestmark = pytest.mark.anyio

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
IDS = list(range(5, 45))
PROMPTS: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": IDS},
    CHAT: {"messages": [{"role": "user", "content": "Hi"}]},
}
LINE_BREAKS = "a\u2028b\u2029c\u0085d"


def array(rows: int, width: int, dtype: str, first: float = 0.0) -> Array:
    kind = np.int32 if dtype == "int32" else np.float32
    values = np.arange(rows * width, dtype=np.float32).reshape(rows, width) / 7 + first
    return Array(dtype, (rows, width), values.astype(kind).tobytes())


def logprobs(count: int, top: int) -> Logprobs:
    return Logprobs(
        token_logprobs=[-1.0 - row for row in range(count)],
        ranks=list(range(count)),
        top_ids=[[(row + rank) % 49000 for rank in range(top)] for row in range(count)],
        top_logprobs=[[-row - rank / 7 for rank in range(top)] for row in range(count)],
    )


def telling(width: int, *, top: int = 0, tokens: int = 30, chosen: bool = False) -> Script:
    """Return a script with all prompt rows and many tokens in one output, as a large step may give."""

    def logits(rows: int, first: float) -> LogitsRows:
        columns = array(rows, width, "int32") if chosen else None
        return LogitsRows(values=array(rows, width, "float32", first), token_ids=columns)

    def script(request: GenerationRequest) -> list[Step]:
        count = len(request.prompt_token_ids)
        asked, states = request.logits, request.hidden_states
        prompt = PromptOutput(
            offset=0,
            logits=logits(count, 0.5) if asked and asked.wants_prompt else None,
            logprobs=logprobs(count - 1, top) if request.prompt_logprobs is not None else None,
            hidden_states=array(count, 576, "float32") if states and states.wants_prompt else None,
        )
        return [
            StepOutput(
                request_id=request.request_id,
                index=0,
                token_ids=[40 + token for token in range(tokens)],
                logits=logits(tokens, 0.25) if asked and asked.wants_generated else None,
                logprobs=logprobs(tokens, top) if request.logprobs is not None else None,
                hidden_states=array(tokens, 576, "float32") if states and states.wants_generated else None,
                prompt=prompt if prompt.nbytes else None,
                finish_reason="length",
            )
        ]

    return script


async def lines(app: App, path: str, body: dict[str, Any]) -> list[bytes]:
    answer = await app.post(path, {**PROMPTS[path], **body, "stream": True})
    assert answer.status_code == 200, answer.text
    return [line.removeprefix(b"data: ") for line in answer.content.split(b"\n\n") if line]


def joined(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a choice from its chunks: text joined, lists and blocks appended."""
    told: dict[str, Any] = {"text": "", "token_ids": [], "logprobs": {}, "prompt_logprobs": []}
    for chunk in chunks:
        (choice,) = chunk["choices"]
        told["text"] += choice.get("text") or choice.get("delta", {}).get("content") or ""
        told["token_ids"] += choice.get("token_ids", [])
        told["prompt_logprobs"] += choice.get("prompt_logprobs", chunk.get("prompt_logprobs", []))
        told["finish_reason"] = choice["finish_reason"]
        for name, entries in (choice["logprobs"] or {}).items():
            told["logprobs"].setdefault(name, []).extend(entries or [])
        for kind in ("logits", "hidden_states"):
            for part in ("generated", "prompt"):
                append_block(
                    told, f"{kind} {part}", choice.get(kind, {}).get(part), len(choice.get("token_ids", []))
                )
    return told


def append_block(told: dict[str, Any], name: str, block: dict[str, Any] | None, num_tokens: int) -> None:
    if block is None:
        return
    rows, _ = block["shape"]
    if name.endswith("generated"):
        assert rows == num_tokens, "a chunk holds the rows of its own tokens"
    else:
        assert block["offset"] == told.get(f"{name} rows", 0)
    told[f"{name} rows"] = told.get(f"{name} rows", 0) + rows
    for member in ("data", "values", "token_ids"):
        if member in block:
            is_text = isinstance(block[member], str)
            values = base64.b64decode(block[member]) if is_text else block[member]
            told[f"{name} {member}"] = told.get(f"{name} {member}", b"" if is_text else []) + values


ROWS = {"positions": "all"}
ASKED: dict[str, tuple[dict[str, Any], Script]] = {
    "whole vocabulary": ({"return_logits": ROWS}, telling(49152)),
    "as lists": ({"return_logits": {**ROWS, "encoding": "list"}}, telling(9000)),
    "chosen columns": ({"return_logits": {**ROWS, "top_k": 5000}}, telling(5000, chosen=True)),
    "chosen columns in base64": (
        {"return_logits": {**ROWS, "top_k": 5000, "encoding": "base64"}},
        telling(5000, chosen=True),
    ),
    "hidden states": (
        {"return_hidden_states": {"positions": "all", "encoding": "list"}},
        telling(1, tokens=150),
    ),
    "prompt logprobs": ({"prompt_logprobs": 400}, telling(1, top=400)),
}


@pytest.mark.parametrize("path", PROMPTS)
@pytest.mark.parametrize("asked", ASKED)
async def test_rows_of_one_step_are_split_into_events_that_join_to_the_whole_answer(
    open_app: OpenApp, path: str, asked: str
) -> None:
    body, script = ASKED[asked]
    async with open_app(script, max_prompt_logprobs=400) as app:
        *told, done = await lines(app, path, body)
        whole = (await app.post(path, {**PROMPTS[path], **body})).json()
    assert done == b"[DONE]"
    assert len(told) > 2, "there is enough for several events"
    assert max(map(len, told)) <= LONGEST_EVENT
    choice = whole["choices"][0]
    choice["delta"] = choice.pop("message", {})
    assert joined([json.loads(line) for line in told]) == joined([whole])


@pytest.mark.parametrize(
    ("path", "body"),
    [(CHAT, {"logprobs": True, "top_logprobs": 200}), (COMPLETIONS, {"logprobs": 500})],
    ids=["chat", "completions"],
)
async def test_log_probabilities_are_split_between_tokens(
    open_app: OpenApp, path: str, body: dict[str, Any]
) -> None:
    options = {"max_logprobs": 200, "max_completion_logprobs": 500}
    top = body.get("top_logprobs", 500)
    async with open_app(telling(1, top=top, tokens=60), **options) as app:
        *told, _ = await lines(app, path, body)
        whole = (await app.post(path, {**PROMPTS[path], **body})).json()
    assert len(told) > 1
    assert max(map(len, told)) <= LONGEST_EVENT
    choice = whole["choices"][0]
    choice["delta"] = choice.pop("message", {})
    assert joined([json.loads(line) for line in told]) == joined([whole])


async def test_an_echoed_prompt_with_log_probabilities_is_split_like_its_rows(open_app: OpenApp) -> None:
    body = {"echo": True, "logprobs": 500}
    async with open_app(telling(1, top=500), max_completion_logprobs=500) as app:
        # The engine reads an echoed prompt as prompt_logprobs.
        *told, _ = await lines(app, COMPLETIONS, body)
        whole = (await app.post(COMPLETIONS, {**PROMPTS[COMPLETIONS], **body})).json()
    assert len(told) > 1
    assert max(map(len, told)) <= LONGEST_EVENT
    assert joined([json.loads(line) for line in told]) == joined([whole])


async def test_one_row_that_is_too_long_alone_is_one_event(open_app: OpenApp) -> None:
    body = {"return_logits": {"positions": "generated"}}
    async with open_app(telling(120_000, tokens=3)) as app:
        *told, _ = await lines(app, COMPLETIONS, body)
    assert [len(json.loads(line)["choices"][0]["token_ids"]) for line in told] == [1, 1, 1]
    assert min(map(len, told)) > LONGEST_EVENT


async def test_a_long_echoed_text_comes_in_several_events(open_app: OpenApp) -> None:
    text = "a \x01 word " * 50_000
    async with open_app(telling(1, tokens=2)) as app:
        app.engine.info = with_context(app, 1 << 20)
        body = {"prompt": text, "echo": True, "max_tokens": 2, "return_token_ids": True}
        *told, _ = await lines(app, COMPLETIONS, body)
        whole = (await app.post(COMPLETIONS, body)).json()
    chunks = [json.loads(line) for line in told]
    assert max(len(line) for line in told[1:]) <= LONGEST_EVENT
    assert joined(chunks)["text"] == whole["choices"][0]["text"]
    assert whole["choices"][0]["text"].startswith(text)
    ids = [
        chunk["choices"][0]["prompt_token_ids"]
        for chunk in chunks
        if "prompt_token_ids" in chunk["choices"][0]
    ]
    assert ids == [whole["choices"][0]["prompt_token_ids"]], "the prompt's ids come once"


def with_context(app: App, max_model_len: int) -> Any:
    import msgspec

    return msgspec.structs.replace(app.state.model().info, max_model_len=max_model_len)


@pytest.mark.parametrize("body", [{"echo": True}, {"echo": True, "logprobs": 1}], ids=["text", "logprobs"])
async def test_no_event_holds_a_character_that_breaks_a_line(open_app: OpenApp, body: dict[str, Any]) -> None:
    """httpx's iter_lines splits at them, as str.splitlines does."""
    async with open_app(telling(1, top=1, tokens=1)) as app:
        asked = {"prompt": LINE_BREAKS, "max_tokens": 1, "stream": True, **body}
        answer = await app.post(COMPLETIONS, asked)
    told = [line for line in answer.text.splitlines() if line]
    assert told == [line for line in answer.text.split("\n") if line]
    text = "".join(json.loads(line[6:])["choices"][0]["text"] for line in told[:-1])
    assert text.startswith(LINE_BREAKS)
