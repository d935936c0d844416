"""The engine's outputs as deltas of the answer: every prompt's choices interleaved, detokenized, stopped."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from logitengine.link.engine_protocol import EngineProtocol
from logitengine.link.messages import (
    Array,
    DrawError,
    GenerationRequest,
    LogitsRows,
    Logprobs,
    PromptOutput,
    StepOutput,
)

from logitserve.errors import ApiError, BadRequestError
from logitserve.jobs.job import Job
from logitserve.jobs.streams import outputs_of
from logitserve.text.detokenizer import Detokenizer
from logitserve.text.stop_strings import StopStrings
from logitserve.text.token_table import TokenTable


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step added to one choice.

    ``token_ids``, the rows of ``logits``, ``logprobs`` and ``hidden_states`` [rows, H], and ``text_offsets`` (where each
    token's text begins in the choice's text) align one to one. ``text`` may lag behind the tokens: characters that are not whole and text that may
    become a stop string are held back. A stop string ends the text, not the rows: the token that completed it keeps its
    row.
    """

    index: int
    token_ids: list[int]
    text: str
    text_offsets: list[int]
    logits: LogitsRows | None = None
    logprobs: Logprobs | None = None
    hidden_states: Array | None = None
    prompt: PromptOutput | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays that it carries."""
        blocks = (self.logits, self.hidden_states, self.prompt)
        return sum(block.nbytes for block in blocks if block is not None)


@dataclass(slots=True)
class Counts:
    """Tokens so far, for ``usage``."""

    prompt: int
    completion: int = 0
    cached: int = 0

    def usage(self) -> dict[str, object]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


class Choice:
    """One continuation of one prompt: its text so far."""

    def __init__(self, index: int, job: Job, request: GenerationRequest, table: TokenTable) -> None:
        self._index = index
        self._min_tokens = request.sampling.min_tokens
        self._detokenizer = Detokenizer(table, skip_special_tokens=job.body.skip_special_tokens)
        self._stops = StopStrings(job.body.stop)
        self._num_tokens = 0
        self._num_characters = 0
        self.finish_reason: str | None = None

    def advance(self, output: StepOutput) -> Delta:
        """Take in a step's tokens. Sets ``finish_reason`` when the choice is over, by a stop string perhaps."""
        if output.finish_reason == "error":
            raise _not_drawn(output.error)
        text, offsets = "", []
        for token_id in output.token_ids:
            offsets.append(self._num_characters)
            text += self._push(token_id, is_stop=token_id == output.stop_token_id)
        self.finish_reason = output.finish_reason
        stop_reason: str | int | None = output.stop_token_id
        if output.finish_reason is not None:
            tail = self._detokenizer.finish()
            self._num_characters += len(tail)
            text += self._stops.push(tail) + self._stops.finish()
        if self._stops.matched is not None:
            self.finish_reason, stop_reason = "stop", self._stops.matched
        return Delta(
            index=self._index,
            token_ids=output.token_ids,
            text=text,
            text_offsets=offsets,
            logits=output.logits,
            logprobs=output.logprobs,
            hidden_states=output.hidden_states,
            prompt=output.prompt,
            finish_reason=self.finish_reason,
            stop_reason=stop_reason,
        )

    def _push(self, token_id: int, *, is_stop: bool) -> str:
        """The text this token releases. A stop token ends the text and is not part of it."""
        self._num_tokens += 1
        piece = "" if is_stop else self._detokenizer.push(token_id)
        self._num_characters += len(piece)
        return piece if self._num_tokens < self._min_tokens else self._stops.push(piece)


def _not_drawn(error: DrawError | None) -> ApiError:
    """Whose fault it is that there is no token."""
    if error == "nothing_allowed":
        return BadRequestError("The request's bans and masks leave no token to draw.", code="nothing_allowed")
    return ApiError(500, "The model's logits were not finite.", code="model_error")


class Generation:
    """All choices of a job as one stream of deltas. Closing it aborts what still runs in the engine."""

    def __init__(self, engine: EngineProtocol, job: Job, table: TokenTable) -> None:
        self._engine = engine
        self._job = job
        self._table = table
        self.counts = Counts(job.num_prompt_tokens)

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """Choices are numbered prompt by prompt: choice j of prompt i is ``i * n + j``. Raises EngineError, ApiError."""
        n = self._job.body.n
        choices = [
            Choice(prompt * n + j, self._job, request, self._table)
            for prompt, request in enumerate(self._job.requests)
            for j in range(n)
        ]
        open_choices = len(choices)
        cached: dict[int, int] = {}
        outputs = outputs_of(self._engine, self._job.requests, self._job.largest_nbytes)
        async with contextlib.aclosing(outputs):
            async for prompt, output in outputs:
                choice = choices[prompt * n + output.index]
                if choice.finish_reason is not None:
                    continue
                delta = choice.advance(output)
                self.counts.completion += len(output.token_ids)
                if output.index == 0 and prompt not in cached:
                    cached[prompt] = output.num_cached_tokens
                    self.counts.cached += output.num_cached_tokens
                if delta.finish_reason is not None:
                    open_choices -= 1
                    if output.finish_reason is None:
                        self._engine.abort_choice(output.request_id, output.index)
                yield delta
                if open_choices == 0:
                    return
