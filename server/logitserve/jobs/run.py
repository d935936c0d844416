"""A job's outputs as deltas: the choices of every prompt interleaved, each as text."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from logitengine.link.engine_protocol import EngineProtocol
from logitengine.link.messages import DrawError, GenerationRequest

from logitserve.errors import ApiError, BadRequestError
from logitserve.held_bytes import HeldBytes
from logitserve.jobs.job import Job
from logitserve.jobs.outputs import outputs_of
from logitserve.text.choice import ChoiceText, Delta
from logitserve.text.detokenizer import Detokenizer
from logitserve.text.parser import PlainText
from logitserve.text.stop_strings import StopStrings


@dataclass(slots=True)
class Counts:
    """Tokens so far, for ``usage`` and the log."""

    prompt: int
    completion: int = 0
    cached: int = 0


class RunningJob:
    """A job that the engine works on. Closing its ``deltas`` aborts what still runs."""

    def __init__(self, job: Job, engine: EngineProtocol, held: HeldBytes) -> None:
        self._job = job
        self._engine = engine
        self._held = held
        self.counts = Counts(job.num_prompt_tokens)

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """Choices are numbered prompt by prompt: choice j of prompt i is ``i * n + j``. Raises EngineError, ApiError."""
        job = self._job
        choices = [self._choice(request) for request in job.requests for _ in range(job.n)]
        num_open = len(choices)
        with_cached: set[int] = set()
        async with contextlib.aclosing(
            outputs_of(self._engine, job.requests, job.row_bytes, self._held)
        ) as outputs:
            async for prompt, output in outputs:
                index = prompt * job.n + output.index
                choice = choices[index]
                if choice.finish_reason is not None:
                    continue
                if output.finish_reason == "error":
                    raise _not_drawn(output.error)
                delta = choice.advance(output, index)
                self.counts.completion += len(output.token_ids)
                if output.index == 0 and prompt not in with_cached:
                    with_cached.add(prompt)
                    self.counts.cached += output.num_cached_tokens
                if delta.finish_reason is not None:
                    num_open -= 1
                    if output.finish_reason is None:
                        self._engine.abort_choice(output.request_id, output.index)
                yield delta
                if num_open == 0:
                    return

    def _choice(self, request: GenerationRequest) -> ChoiceText:
        text = self._job.text
        detokenizer = Detokenizer(
            self._job.model.tokenizer.table, skip_special_tokens=text.skip_special_tokens
        )
        return ChoiceText(
            detokenizer, StopStrings(text.stop), PlainText(), min_tokens=request.sampling.min_tokens
        )


def _not_drawn(error: DrawError | None) -> ApiError:
    """Whose fault it is that there is no token."""
    if error == "nothing_allowed":
        return BadRequestError("The request's bans and masks leave no token to draw.", code="nothing_allowed")
    return ApiError(500, "The model's logits were not finite.", code="model_error")
