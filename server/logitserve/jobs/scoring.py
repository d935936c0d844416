"""Prompts that are read and not continued: run side by side, each reduced to its score as its rows arrive."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable
from typing import Any, Protocol

import orjson
from fastapi import Request
from fastapi.responses import Response
from logitengine.link.messages import GenerationRequest, HeadSpec, Pooling, PromptOutput, SamplingParams
from msgspec import Struct

from logitserve.answers.answering import CLIENT_CLOSED_REQUEST, INLINE_LIST_BYTES
from logitserve.answers.generation import Counts
from logitserve.http.request_log import LogFields
from logitserve.http.sse import ClientDisconnectedError, until_disconnect
from logitserve.jobs.bounds import check_context
from logitserve.jobs.prompts import from_input, input_param
from logitserve.jobs.streams import outputs_of
from logitserve.protocol.inputs import InputBody, InputOrMessagesBody
from logitserve.state import ServerState


class Asked(Struct, frozen=True, kw_only=True):
    """What to ask the engine about every prompt."""

    prompt_logprobs: int | None = None
    pooling: Pooling | None = None
    head: HeadSpec | None = None


class Score(Protocol):
    """What is kept of one prompt's outputs, and how it is told."""

    def add(self, prompt: PromptOutput) -> None: ...

    def entry(self) -> dict[str, Any]: ...


async def respond_scored(
    body: InputBody | InputOrMessagesBody,
    asked: Asked,
    new_score: Callable[[], Score],
    extras: dict[str, Any],
    state: ServerState,
    request: Request,
) -> Response:
    """Read every input and answer with a list of their scores; ``extras`` stand beside it. Raises ApiError, EngineError."""
    name = state.model().check_name(body.model)
    requests = await _requests(body, asked, state)
    counts = Counts(sum(len(one.prompt_token_ids) for one in requests))
    LogFields.of(request.scope).counts = counts

    async def collect() -> bytes:
        scores = [new_score() for _ in requests]
        nbytes = 0
        # What comes of a prompt is small and reduced at once: nothing stands against running all of them.
        async with contextlib.aclosing(outputs_of(state.engine, requests, largest_nbytes=0)) as outputs:
            async for index, output in outputs:
                nbytes += output.nbytes
                if output.prompt is not None:
                    scores[index].add(output.prompt)

        def render() -> bytes:
            data = [{**score.entry(), "index": index} for index, score in enumerate(scores)]
            usage = {"prompt_tokens": counts.prompt, "total_tokens": counts.prompt}
            answer = {"object": "list", "model": name, **extras, "data": data, "usage": usage}
            return orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)

        return await state.encode(render, nbytes, INLINE_LIST_BYTES)

    try:
        content = await until_disconnect(request.receive, collect())
    except ClientDisconnectedError:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return Response(content, media_type="application/json")


async def _requests(
    body: InputBody | InputOrMessagesBody, asked: Asked, state: ServerState
) -> list[GenerationRequest]:
    prompts = await from_input(body, state)
    for prompt in prompts:
        check_context(len(prompt.token_ids), 0, state.model(), input_param(body))
    return [
        GenerationRequest(
            request_id=uuid.uuid4().hex,
            prompt_token_ids=prompt.token_ids,
            sampling=SamplingParams(max_tokens=0),
            prompt_logprobs=asked.prompt_logprobs,
            pooling=asked.pooling,
            head=asked.head,
            cache_salt=body.cache_salt,
        )
        for prompt in prompts
    ]
