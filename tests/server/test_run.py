"""The engine's streams, merged into one and closed together."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from logitengine.link.messages import GenerationRequest, StepOutput
from logitserve.access.caller import Caller
from logitserve.answers.answer import usage
from logitserve.jobs.job import Job, make_job
from logitserve.jobs.options import completion_options
from logitserve.jobs.run import RunningJob
from logitserve.protocol.completions import CompletionBody
from logitserve.telemetry.record import RequestRecord
from scripted_engine import App, OpenApp, Step

pytestmark = pytest.mark.anyio


def script(request: GenerationRequest) -> list[Step]:
    """Give one token at once, and then nothing."""
    first = StepOutput(request_id=request.request_id, index=0, token_ids=[33], num_cached_tokens=1)
    return [first, asyncio.get_running_loop().create_future()]


async def job_of(app: App, **body: object) -> Job:
    validated = CompletionBody.model_validate(body, context=app.state.config)
    return await make_job(completion_options(validated), app.state, Caller())


@pytest.mark.parametrize("prompts", [1, 3])
async def test_closing_the_deltas_closes_every_request(open_app: OpenApp, prompts: int) -> None:
    """A request is closed too while its next output is not awaited."""
    async with open_app(script) as app:
        running = RunningJob(
            await job_of(app, prompt=["Hi"] * prompts),
            app.state,
            RequestRecord("r", method="POST", route="other"),
        )
        deltas = running.deltas()
        seen = {(await anext(deltas)).index for _ in range(prompts)}
        assert seen == set(range(prompts))
        assert app.engine.num_open == prompts
        await deltas.aclose()
        assert app.engine.num_open == 0
        told = usage(running.counts)
        assert told["prompt_tokens_details"] == {"cached_tokens": prompts}
        assert told["completion_tokens"] == prompts


async def test_unseeded_prompts_of_a_batch_draw_their_own_seeds(open_app: OpenApp) -> None:
    async with open_app(script) as app:
        unseeded = await job_of(app, prompt=["Hi"] * 2)
        seeded = await job_of(app, prompt=["Hi"] * 2, seed=-1)
    assert len({request.sampling.seed for request in unseeded.requests}) == 2
    assert {request.sampling.seed for request in seeded.requests} == {2**64 - 1}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_whose_bans_leave_no_token_gets_an_invalid_request_error(
    open_app: OpenApp, *, stream: bool
) -> None:
    def script(request: GenerationRequest) -> list[Step]:
        name = request.request_id
        return [
            StepOutput(request_id=name, index=0, token_ids=[33]),
            StepOutput(request_id=name, index=0, finish_reason="error", error="nothing_allowed"),
        ]

    async with open_app(script) as app:
        answer = await app.post("/v1/completions", {"prompt": "Hi", "max_tokens": 3, "stream": stream})
    if stream:
        assert answer.status_code == 200
        *_, last = [line for line in answer.text.split("\n\n") if line]
        error = msgspec.json.decode(last.removeprefix("data: "))["error"]
    else:
        assert answer.status_code == 400
        error = answer.json()["error"]
    assert error["code"] == "nothing_allowed"
    assert error["type"] == "invalid_request_error"
