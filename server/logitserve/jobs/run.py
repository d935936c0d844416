"""A job's outputs as deltas: the choices of every prompt interleaved, each as text."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator

from logitengine.errors import EngineOverloadedError
from logitengine.link.messages import GenerationRequest, LogitsRows, StepOutput
from prometheus_client import Counter

from logitserve.errors import ApiError, BadRequestError
from logitserve.grammars.frames import shortened
from logitserve.jobs.job import Job
from logitserve.jobs.outputs import NumberedOutput, outputs_of
from logitserve.state import ServerState
from logitserve.telemetry.record import Counts, RequestRecord
from logitserve.text.choice import ChoiceText, Delta
from logitserve.text.detokenizer import Detokenizer
from logitserve.text.parser import PlainText, TextParser
from logitserve.text.stop_strings import StopStrings, ThinkingGate


class RunningJob:
    """A job that the engine works on. Closing its ``deltas`` aborts the requests that still run.

    Its counts and times go into the request's record.
    """

    def __init__(self, job: Job, state: ServerState, record: RequestRecord) -> None:
        self._job = job
        self._state = state
        self._metrics = state.metrics
        self._record = record
        self._begun_prompts: set[int] = set()
        self._last_token_at = [0.0] * job.num_choices
        family = job.family
        thinks = family is not None and family.reads_reasoning
        self.counts = record.counts = Counts(job.num_prompt_tokens, reasoning=0 if thinks else None)

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """Yield deltas of choices, numbered prompt by prompt: choice j of prompt i is ``i * n + j``.

        Raises EngineError, ApiError.
        """
        job, engine = self._job, self._state.engine
        choices = [
            self._choice(request, prompt.text or "")
            for request, prompt in zip(job.requests, job.prompts, strict=True)
            for _ in range(job.n)
        ]
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
                        raise _not_drawn(output, job.grammar_param)
                    delta = choice.advance(output, index)
                    self._count(prompt, index, output)
                    if delta.reasoning_tokens and self.counts.reasoning is not None:
                        self.counts.reasoning += delta.reasoning_tokens
                    if delta.finish_reason is not None:
                        num_open -= 1
                        self._record.finish_reasons.append(delta.finish_reason)
                        if output.finish_reason is None:
                            engine.abort_choice(output.request_id, output.index)
                    yield delta
                numbered = await anext(outputs, None) if num_open else None

    async def _first(self, outputs: AsyncGenerator[NumberedOutput, None]) -> NumberedOutput | None:
        """Wait in the queue until the engine has begun the job. Raises EngineError, ApiError."""
        queue, seconds = self._state.queue, self._state.config.queue_timeout
        self._record.queued = time.monotonic()
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
            if first is not None:
                _, output = first
                self._record.begun = time.monotonic() - output.begun_seconds
                self._metrics.begun(self._record)
            return first

    def _count(self, prompt: int, choice: int, output: StepOutput) -> None:
        if output.token_ids:
            self._count_tokens(choice, len(output.token_ids))
        if output.index == 0 and prompt not in self._begun_prompts:
            self._begun_prompts.add(prompt)
            self.counts.cached += output.num_cached_tokens
            self._metrics.prompt_tokens.inc(len(self._job.requests[prompt].prompt_token_ids))
        if output.logits is not None:
            self._count_rows(output.logits, self._metrics.generated_rows)
        if output.prompt is not None and output.prompt.logits is not None:
            self._count_rows(output.prompt.logits, self._metrics.prompt_rows)

    def _count_tokens(self, choice: int, count: int) -> None:
        self.counts.completion += count
        now, record = time.monotonic(), self._record
        last = self._last_token_at[choice]
        if last:
            self._metrics.inter_token_latency.observe(now - last)
        elif record.first_token is None:
            record.first_token = now
            self._metrics.answered(record)
        self._last_token_at[choice] = record.last_token = now

    def _count_rows(self, rows: LogitsRows, counter: Counter) -> None:
        counter.inc(rows.values.shape[0])
        self._metrics.row_bytes.inc(rows.nbytes)

    def _choice(self, request: GenerationRequest, prompt: str) -> ChoiceText:
        job, model, skips = self._job, self._job.model, self._job.text.skip_special_tokens
        parser: TextParser = PlainText()
        gate: ThinkingGate | None = None
        kept: dict[int, str] = {}
        if job.family is not None:
            kept = model.parsed_tokens
            parser = job.family.parser(
                prompt,
                tools=job.calls.tools,
                parses_calls=job.calls.may_call and bool(job.calls.tools),
                hidden=frozenset(kept.values()) if skips else frozenset(),
            )
            gate = job.family.thinking_gate(prompt) if job.text.stop else None
        return ChoiceText(
            Detokenizer(model.tokenizer.table, skip_special_tokens=skips, kept=kept),
            StopStrings(job.text.stop),
            parser,
            min_tokens=request.sampling.min_tokens,
            gate=gate,
        )


def _not_drawn(output: StepOutput, grammar_param: str | None) -> ApiError:
    """Return the error for a token that could not be drawn: the fault of the request, its grammar, or the model."""
    if output.error == "nothing_allowed":
        return BadRequestError("The request's bans and masks leave no token to draw.", code="nothing_allowed")
    if output.error == "grammar_failed":
        return BadRequestError(
            f"'{grammar_param}' could not be followed any further: {shortened(output.error_detail or '')}.",
            param=grammar_param,
            code="grammar_failed",
        )
    if output.error == "image_failed":
        return ApiError(
            500, "The model's image encoder failed on an image of 'messages'.", code="model_error"
        )
    return ApiError(500, "The model's logits were not finite.", code="model_error")
