"""A job's outputs as deltas: the choices of every prompt interleaved, each as text."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from logitengine.errors import EngineOverloadedError
from logitengine.link.messages import GenerationRequest, StepOutput

from logitserve.errors import ApiError, BadRequestError
from logitserve.jobs.job import Job
from logitserve.jobs.outputs import NumberedOutput, outputs_of
from logitserve.state import ServerState
from logitserve.text.choice import ChoiceText, Delta
from logitserve.text.detokenizer import Detokenizer
from logitserve.text.parser import PlainText
from logitserve.text.stop_strings import StopStrings


@dataclass(slots=True)
class Counts:
    """Counts of tokens so far, for ``usage`` and the log."""

    prompt: int
    completion: int = 0
    cached: int = 0


class RunningJob:
    """A job that the engine works on. Closing its ``deltas`` aborts the requests that still run."""

    def __init__(self, job: Job, state: ServerState) -> None:
        self._job = job
        self._state = state
        self._with_cached: set[int] = set()
        self.counts = Counts(job.num_prompt_tokens)

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """Yield deltas of choices, numbered prompt by prompt: choice j of prompt i is ``i * n + j``.

        Raises EngineError, ApiError.
        """
        job, engine = self._job, self._state.engine
        choices = [self._choice(request) for request in job.requests for _ in range(job.n)]
        num_open = len(choices)
        async with contextlib.aclosing(
            outputs_of(engine, job.requests, job.row_bytes, self._state.held_bytes)
        ) as outputs:
            numbered = await self._first(outputs)
            while num_open and numbered is not None:
                prompt, output = numbered
                index = prompt * job.n + output.index
                choice = choices[index]
                if choice.finish_reason is None:
                    if output.finish_reason == "error":
                        raise _not_drawn(output)
                    delta = choice.advance(output, index)
                    self._count(prompt, output)
                    if delta.finish_reason is not None:
                        num_open -= 1
                        if output.finish_reason is None:
                            engine.abort_choice(output.request_id, output.index)
                    yield delta
                numbered = await anext(outputs, None) if num_open else None

    async def _first(self, outputs: AsyncGenerator[NumberedOutput, None]) -> NumberedOutput | None:
        """Wait in the queue until the engine has begun the job. Raises EngineError, ApiError."""
        queue, seconds = self._state.queue, self._state.config.queue_timeout
        with queue.stay(self.counts.prompt) as place:
            try:
                async with asyncio.timeout(seconds or None) as limit:
                    first = await anext(outputs, None)
            except EngineOverloadedError as error:
                raise queue.full(str(error)) from error
            except TimeoutError:
                if not limit.expired():
                    raise
                place.begin()  # counts the wait for Retry-After
                raise ApiError(
                    503,
                    f"The request did not begin within {seconds:g} s (--queue-timeout); try again.",
                    code="queue_timeout",
                    headers=queue.retry_after,
                ) from None
            place.begin()
            return first

    def _count(self, prompt: int, output: StepOutput) -> None:
        self.counts.completion += len(output.token_ids)
        if output.index == 0 and prompt not in self._with_cached:
            self._with_cached.add(prompt)
            self.counts.cached += output.num_cached_tokens

    def _choice(self, request: GenerationRequest) -> ChoiceText:
        text = self._job.text
        detokenizer = Detokenizer(
            self._job.model.tokenizer.table, skip_special_tokens=text.skip_special_tokens
        )
        return ChoiceText(
            detokenizer, StopStrings(text.stop), PlainText(), min_tokens=request.sampling.min_tokens
        )


def _not_drawn(output: StepOutput) -> ApiError:
    """Return the error for a token that could not be drawn: the request's fault, or the model's."""
    if output.error == "nothing_allowed":
        return BadRequestError("The request's bans and masks leave no token to draw.", code="nothing_allowed")
    if output.error == "grammar_failed":
        return BadRequestError(
            f"The answer's grammar could not be followed any further: {output.error_detail}.",
            code="grammar_failed",
        )
    return ApiError(500, "The model's logits were not finite.", code="model_error")
