"""The way from the engine's outputs to the wire: held-back text, rows that are not, and failures."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from logitengine.errors import (
    EngineDeadError,
    EngineError,
    EngineNotReadyError,
    EngineOverloadedError,
    RequestFatalError,
    RequestRefusedError,
)
from logitengine.link.messages import (
    Array,
    GenerationRequest,
    LogitsRows,
    Logprobs,
    ModelInfo,
    PromptOutput,
    StepOutput,
)
from logitserve.text.token_table import TokenTable
from scripted_engine import App, OpenApp, Script, Step
from tokenizers import Tokenizer

pytestmark = pytest.mark.anyio

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
PROMPT = {"prompt": "Hi", "max_tokens": 30}


@pytest.fixture(scope="module")
def tokenizer(model_info: ModelInfo) -> Tokenizer:
    return Tokenizer.from_file(str(Path(model_info.tokenizer_path) / "tokenizer.json"))


def row(value: float) -> LogitsRows:
    """Return one row with one column, whose value identifies the row."""
    return LogitsRows(
        values=Array("float32", (1, 1), np.array([value], "<f4").tobytes()),
        token_ids=Array("int32", (1, 1), np.array([7], "<i4").tobytes()),
    )


def telling(token_ids: list[int], *, finish: str | None = "length", index: int = 0) -> Script:
    """Return a script that draws these tokens, token i with the row [i]."""

    def script(request: GenerationRequest) -> list[Step]:
        return [
            StepOutput(
                request_id=request.request_id,
                index=index,
                token_ids=[token_id],
                logits=row(position) if request.logits else None,
                finish_reason="length" if finish and position == len(token_ids) - 1 else None,
            )
            for position, token_id in enumerate(token_ids)
        ]

    return script


def events(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return ["[DONE]" if line == "[DONE]" else json.loads(line) for line in lines]


async def stream(app: App, **body: Any) -> list[Any]:
    answer = await app.post(COMPLETIONS, {**PROMPT, **body, "stream": True})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    return events(answer.text)


async def test_rows_go_out_while_their_text_is_held_back(open_app: OpenApp, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("日本語 😀").ids
    assert len(ids) > 5, "characters must span tokens here"
    async with open_app(telling(ids)) as app:
        *chunks, done = await stream(app, return_logits={"top_k": 1})
    assert done == "[DONE]"
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [choice["token_ids"] for choice in choices] == [[token_id] for token_id in ids]
    assert [choice["logits"]["generated"]["values"] for choice in choices] == [
        [[float(i)]] for i in range(len(ids))
    ]
    assert "" in [choice["text"] for choice in choices]
    assert "".join(choice["text"] for choice in choices) == "日本語 😀"
    assert all("\ufffd" not in choice["text"] for choice in choices)


async def test_a_stream_of_text_alone_leaves_empty_chunks_out(
    open_app: OpenApp, tokenizer: Tokenizer
) -> None:
    async with open_app(telling(tokenizer.encode("日本語 😀").ids)) as app:
        *chunks, _ = await stream(app)
    assert all(chunk["choices"][0]["text"] for chunk in chunks)


async def test_an_unfinished_character_at_the_end_is_replaced(
    open_app: OpenApp, tokenizer: Tokenizer
) -> None:
    ids = tokenizer.encode("😀").ids[:1]
    async with open_app(telling(ids)) as app:
        answer = await app.post(COMPLETIONS, PROMPT)
    assert answer.json()["choices"][0]["text"] == "\ufffd"


async def test_a_stop_string_aborts_the_choice_and_keeps_the_rows_up_to_it(
    open_app: OpenApp, tokenizer: Tokenizer
) -> None:
    ids = tokenizer.encode("one two three four five").ids
    async with open_app(telling(ids, finish=None)) as app:
        answer = await app.post(COMPLETIONS, {**PROMPT, "stop": "ee f", "return_logits": {"top_k": 1}})
        assert app.engine.aborted == [(app.engine.requests[0].request_id, 0)]
    (choice,) = answer.json()["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("one two thr", "stop", "ee f")
    assert choice["token_ids"] == ids[:4], "the token that completed the stop string has its row"
    assert len(choice["logits"]["generated"]["values"]) == 4


async def test_text_held_back_for_a_stop_string_that_never_comes_is_sent_at_the_end(
    open_app: OpenApp, tokenizer: Tokenizer
) -> None:
    async with open_app(telling(tokenizer.encode("one two").ids)) as app:
        answer = await app.post(COMPLETIONS, {**PROMPT, "stop": "two three"})
    assert answer.json()["choices"][0]["text"] == "one two"
    assert answer.json()["choices"][0]["finish_reason"] == "length"


async def test_stop_strings_wait_for_min_tokens(open_app: OpenApp, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a a a a a a").ids
    async with open_app(telling(ids)) as app:
        answer = await app.post(COMPLETIONS, {**PROMPT, "stop": " a", "min_tokens": 4})
    assert answer.json()["choices"][0]["text"] == "a a a"


async def test_a_stop_token_is_sent_as_id_and_not_as_text(open_app: OpenApp, tokenizer: Tokenizer) -> None:
    first, last = tokenizer.encode("yes.").ids

    def script(request: GenerationRequest) -> list[Step]:
        name = request.request_id
        return [
            StepOutput(request_id=name, index=0, token_ids=[first]),
            StepOutput(request_id=name, index=0, token_ids=[last], finish_reason="stop", stop_token_id=last),
        ]

    async with open_app(script) as app:
        answer = await app.post(COMPLETIONS, {**PROMPT, "stop_token_ids": [last], "return_token_ids": True})
    (choice,) = answer.json()["choices"]
    assert (choice["text"], choice["token_ids"], choice["stop_reason"]) == ("yes", [first, last], last)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_infinite_logprobs_are_numbers_that_json_has(open_app: OpenApp, path: str) -> None:
    minus_infinity = float("-inf")

    def script(request: GenerationRequest) -> list[Step]:
        scores = Logprobs(
            token_logprobs=[minus_infinity], ranks=[1], top_ids=[[33]], top_logprobs=[[minus_infinity]]
        )
        return [
            StepOutput(
                request_id=request.request_id,
                index=0,
                token_ids=[34],
                logprobs=scores,
                finish_reason="length",
            )
        ]

    body = {
        "max_tokens": 1,
        **({"prompt": "Hi", "logprobs": 1} if path == COMPLETIONS else {"logprobs": True}),
    }
    if path == CHAT:
        body |= {"messages": [{"role": "user", "content": "Hi"}], "top_logprobs": 1}
    async with open_app(script) as app:
        answer = await app.post(path, body)
    logprobs = answer.json()["choices"][0]["logprobs"]
    told = logprobs["token_logprobs"] if path == COMPLETIONS else [logprobs["content"][0]["logprob"]]
    assert told == [-9999.0]


async def test_many_log_probabilities_are_written_beside_the_event_loop(
    open_app: OpenApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    top = 1000
    threads: list[int] = []
    text = TokenTable.text

    def recorded(table: TokenTable, token_id: int) -> str:
        threads.append(threading.get_ident())
        return text(table, token_id)

    def script(request: GenerationRequest) -> list[Step]:
        count = len(request.prompt_token_ids) - 1
        logprobs = Logprobs(
            token_logprobs=[-1.0] * count,
            ranks=[0] * count,
            top_ids=[list(range(top))] * count,
            top_logprobs=[[-1.0] * top] * count,
        )
        prompt = PromptOutput(offset=0, logprobs=logprobs)
        return [StepOutput(request_id=request.request_id, index=0, prompt=prompt, finish_reason="length")]

    monkeypatch.setattr(TokenTable, "text", recorded)
    body = {"prompt": list(range(5, 55)), "max_tokens": 0, "prompt_logprobs": top}
    async with open_app(script, max_prompt_logprobs=top) as app:
        answer = await app.post(COMPLETIONS, body)
    assert len(answer.json()["choices"][0]["prompt_logprobs"]) == 50
    assert len(threads) >= 49 * top
    assert threading.get_ident() not in threads


async def test_prompt_blocks_join_and_keep_their_offsets(open_app: OpenApp) -> None:
    def script(request: GenerationRequest) -> list[Step]:
        count = len(request.prompt_token_ids)
        blocks = [PromptOutput(offset=position, logits=row(position)) for position in range(count)]
        outputs = [StepOutput(request_id=request.request_id, index=0, prompt=block) for block in blocks]
        return [*outputs, StepOutput(request_id=request.request_id, index=0, finish_reason="length")]

    body = {"prompt": [5, 6, 7], "max_tokens": 0, "return_logits": {"top_k": 1, "positions": "prompt"}}
    async with open_app(script) as app:
        answer = await app.post(COMPLETIONS, body)
        *chunks, _ = await stream(app, **body)
    whole = answer.json()["choices"][0]["logits"]
    assert whole["batch_invariant"] is False
    assert "generated" not in whole
    assert (whole["prompt"]["offset"], whole["prompt"]["values"]) == (0, [[0.0], [1.0], [2.0]])
    told = [chunk["choices"][0]["logits"]["prompt"] for chunk in chunks[:3]]
    assert [(block["offset"], block["values"]) for block in told] == [(i, [[float(i)]]) for i in range(3)]


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("error", "status", "retries"),
    [
        (EngineOverloadedError("the queue is full"), 429, True),
        (EngineNotReadyError("restarting"), 503, True),
        (EngineDeadError("died"), 503, True),
        (RequestFatalError("died twice"), 500, False),
        (RequestRefusedError("cannot fit"), 400, False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, EngineError) else None,
)
async def test_a_failure_before_the_first_token_is_a_status(
    open_app: OpenApp, error: EngineError, status: int, *, retries: bool, streamed: bool
) -> None:
    async with open_app(lambda _: [error]) as app:
        answer = await app.post(COMPLETIONS, {**PROMPT, "stream": streamed})
    assert answer.status_code == status
    assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
    assert ("retry-after" in answer.headers) is retries


async def test_a_request_that_ended_every_process_it_had_is_not_to_be_tried_again(open_app: OpenApp) -> None:
    async with open_app(lambda _: [RequestFatalError("died twice")]) as app:
        answer = await app.post(COMPLETIONS, PROMPT)
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "request_fatal")
    assert answer.headers["x-should-retry"] == "false"


async def test_a_failure_in_a_stream_is_one_error_event_and_the_end(open_app: OpenApp) -> None:
    def script(request: GenerationRequest) -> list[Step]:
        return [
            StepOutput(request_id=request.request_id, index=0, token_ids=[33]),
            EngineDeadError("it died"),
        ]

    async with open_app(script) as app:
        first, last = await stream(app)
        whole = await app.post(COMPLETIONS, PROMPT)
    assert first["choices"][0]["text"]
    assert last["error"]["code"] == "engine_dead"
    assert whole.status_code == 503


async def test_the_answer_to_an_unforeseen_failure_hides_its_cause(open_app: OpenApp) -> None:
    def script(_: GenerationRequest) -> list[Step]:
        raise RuntimeError("a secret path")

    async with open_app(script) as app:
        answer = await app.post(COMPLETIONS, PROMPT)
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert answer.json()["error"]["type"] == "server_error"
    assert answer.headers["x-request-id"]


async def test_logits_that_are_not_finite_are_an_error_and_no_text(open_app: OpenApp) -> None:
    def script(request: GenerationRequest) -> list[Step]:
        return [StepOutput(request_id=request.request_id, index=0, finish_reason="error")]

    async with open_app(script) as app:
        assert (await app.post(COMPLETIONS, PROMPT)).status_code == 500


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("prompts", [1, 3])
async def test_a_client_that_goes_away_closes_its_requests(
    open_app: OpenApp, prompts: int, *, streamed: bool
) -> None:
    """The test drives the app below HTTP, and disconnects once every request runs."""

    def script(request: GenerationRequest) -> list[Step]:
        return [
            StepOutput(request_id=request.request_id, index=0, token_ids=[33]),
            asyncio.get_running_loop().create_future(),
        ]

    async with open_app(script) as app:
        body = json.dumps({"prompt": ["Hi"] * prompts, "stream": streamed}).encode()
        told = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> dict[str, Any]:
            message = next(told, None)
            if message is None:
                await app.engine.running(prompts)
                message = {"type": "http.disconnect"}
            return message

        async def send(_: object) -> None:
            pass

        scope: dict[str, Any] = {
            "type": "http",
            "method": "POST",
            "path": COMPLETIONS,
            "raw_path": b"",
            "query_string": b"",
        }
        scope |= {
            "headers": [(b"host", b"test")],
            "app": app.asgi,
            "http_version": "1.1",
            "scheme": "http",
            "root_path": "",
        }
        async with asyncio.timeout(10):
            await app.asgi(scope, receive, send)
        assert len(app.engine.requests) == prompts
        assert app.engine.num_open == 0
        assert app.state.idle.is_set()
