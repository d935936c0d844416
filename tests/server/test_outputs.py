"""Jobs of several requests, which start as the engine's queue has room."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Generator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from logitengine.errors import EngineDeadError, EngineError, EngineOverloadedError
from logitengine.link.messages import GenerationRequest, ModelInfo, SamplingParams, StepOutput
from logitserve.held_bytes import HeldBytes
from logitserve.jobs.limits import RowBytes
from logitserve.jobs.outputs import outputs_of
from scripted_engine import ScriptedEngine, Step

pytestmark = pytest.mark.anyio


class Turn:
    """Step that lets other tasks run and then calls ``then``. Unlike a coroutine, it may stay unawaited."""

    def __init__(self, then: Callable[[], None] = lambda: None) -> None:
        self._then = then

    def __await__(self) -> Generator[None, None, None]:
        yield
        self._then()


class Queue:
    """Script of an engine with room for ``room`` sequences, of which other clients take ``others``."""

    def __init__(self, room: int, *, others: int = 0, steps: int = 1) -> None:
        self.room = room
        self.others = others
        self.steps = steps
        self.held = 0
        self.most_held = 0
        self.refusals = 0

    def script(self, request: GenerationRequest) -> list[Step]:
        if self.held + self.others >= self.room:
            self.refusals += 1
            return [EngineOverloadedError("the queue is full")]
        self.held += request.n
        self.most_held = max(self.most_held, self.held)
        tokens = [
            StepOutput(request_id=request.request_id, index=0, token_ids=[33]) for _ in range(self.steps)
        ]
        steps: list[Step] = [Turn(), *tokens, Turn(lambda: self._leave(request.n))]
        return [*steps, StepOutput(request_id=request.request_id, index=0, finish_reason="length")]

    def _leave(self, n: int) -> None:
        self.held -= n


def requests(count: int, n: int) -> list[GenerationRequest]:
    return [
        GenerationRequest(
            request_id=str(number), prompt_token_ids=[5], n=n, sampling=SamplingParams(max_tokens=9)
        )
        for number in range(count)
    ]


async def answered(engine: ScriptedEngine, wanted: list[GenerationRequest]) -> Counter[int]:
    """Return how often each request ended."""
    ends: Counter[int] = Counter()
    async for number, output in outputs_of(engine, wanted, RowBytes(0, 0), HeldBytes(1 << 20)):
        assert output.request_id == wanted[number].request_id
        ends[number] += output.finish_reason is not None
    return ends


async def test_a_job_larger_than_the_queue_is_answered_by_an_idle_engine(model_info: ModelInfo) -> None:
    """256 prompts with n = 5 are more sequences than the queue's default of 1024."""
    queue = Queue(1024)
    ends = await answered(ScriptedEngine(model_info, queue.script), requests(256, 5))
    assert ends == dict.fromkeys(range(256), 1)
    assert queue.refusals == 0


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(room=st.integers(1, 12), count=st.integers(2, 30), n=st.integers(1, 5), steps=st.integers(1, 3))
def test_prompts_that_the_queue_refuses_are_started_when_others_end(
    model_info: ModelInfo, room: int, count: int, n: int, steps: int
) -> None:
    queue = Queue(room, steps=steps)
    engine = ScriptedEngine(model_info, queue.script)
    ends = asyncio.run(answered(engine, requests(count, n)))
    assert ends == dict.fromkeys(range(count), 1)
    assert engine.num_open == 0
    assert queue.held == 0


async def test_a_job_that_has_begun_waits_while_somebody_else_fills_the_queue(model_info: ModelInfo) -> None:
    """No request of the job runs after the refusal, so no end of one signals that there is room."""
    queue = Queue(3)
    wanted = requests(6, 1)

    def script(request: GenerationRequest) -> list[Step]:
        if queue.held == 0 and len(set(told)) == 3 and queue.refusals < 5:
            queue.refusals += 1
            return [EngineOverloadedError("the queue is full")]
        return queue.script(request)

    told: list[int] = []
    engine = ScriptedEngine(model_info, script)
    async for number, output in outputs_of(engine, wanted, RowBytes(0, 0), HeldBytes(1 << 20)):
        if output.finish_reason is not None:
            told.append(number)
    assert sorted(told) == list(range(6))


async def test_a_job_without_a_begun_request_is_refused_by_a_full_queue(model_info: ModelInfo) -> None:
    engine = ScriptedEngine(model_info, Queue(3, others=3).script)
    with pytest.raises(EngineOverloadedError):
        await answered(engine, requests(6, 2))
    assert engine.num_open == 0


async def test_any_other_error_ends_the_job(model_info: ModelInfo) -> None:
    def script(request: GenerationRequest) -> list[Step]:
        if request.request_id == "3":
            return [EngineDeadError("died")]
        return [asyncio.get_running_loop().create_future()]

    engine = ScriptedEngine(model_info, script)
    with pytest.raises(EngineError, match="died"):
        await answered(engine, requests(6, 1))
    assert engine.num_open == 0
