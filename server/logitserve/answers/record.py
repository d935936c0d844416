"""What one choice was told: by a single delta for a chunk, by all of them for a whole answer."""

from __future__ import annotations

from typing import Any

from logitengine.link.messages import LogitsRows, Logprobs, PromptOutput

from logitserve.answers.generation import Delta
from logitserve.answers.logits_wire import RowBlocks
from logitserve.answers.logprobs import joined, prompt_entries
from logitserve.jobs.job import Job
from logitserve.protocol.rows import RowOptions
from logitserve.state import Model


class Record:
    """Collects deltas of one choice; arrays are encoded as they come."""

    def __init__(self, job: Job, model: Model, index: int) -> None:
        self._job = job
        self._model = model
        self.index = index
        self.prompt = job.prompts[index // job.body.n]
        self.is_first_of_prompt = index % job.body.n == 0
        self._text: list[str] = []
        self.token_ids: list[int] = []
        self.text_offsets: list[int] = []
        self._logprobs: list[Logprobs] = []
        self._prompt_logprobs: list[Logprobs] = []
        self._prompt_offset: int | None = None
        self._logits = _blocks(job.body.return_logits)
        self._hidden_states = _blocks(job.body.return_hidden_states)
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None

    def add(self, delta: Delta) -> None:
        self._text.append(delta.text)
        self.token_ids += delta.token_ids
        self.text_offsets += delta.text_offsets
        if delta.logprobs is not None:
            self._logprobs.append(delta.logprobs)
        if delta.logits is not None:
            self._logits.add_generated(delta.logits)
        if delta.hidden_states is not None:
            self._hidden_states.add_generated(LogitsRows(values=delta.hidden_states))
        if delta.prompt is not None:
            self._add_prompt(delta.prompt)
        self.finish_reason = delta.finish_reason
        self.stop_reason = delta.stop_reason

    def _add_prompt(self, prompt: PromptOutput) -> None:
        if self._prompt_offset is None:
            self._prompt_offset = prompt.offset
        if prompt.logits is not None:
            self._logits.add_prompt(prompt.logits, prompt.offset)
        if prompt.hidden_states is not None:
            self._hidden_states.add_prompt(LogitsRows(values=prompt.hidden_states), prompt.offset)
        if prompt.logprobs is not None:
            self._prompt_logprobs.append(prompt.logprobs)

    @property
    def text(self) -> str:
        return "".join(self._text)

    @property
    def logprobs(self) -> Logprobs:
        """Log-probabilities of the generated tokens."""
        return joined(self._logprobs)

    @property
    def prompt_offset(self) -> int | None:
        """Position of the first prompt row collected, if any was."""
        return self._prompt_offset

    @property
    def prompt_logprobs(self) -> Logprobs:
        """Log-probabilities of the prompt tokens ``prompt_offset + 1`` and on."""
        return joined(self._prompt_logprobs)

    def prompt_entries(self) -> list[dict[str, Any] | None] | None:
        """vLLM's prompt_logprobs, None for the first token; None where there are none to tell."""
        offset = self._prompt_offset
        if self._job.body.prompt_logprobs is None or offset is None:
            return None
        scores = self.prompt_logprobs
        scored = self.prompt.token_ids[offset + 1 : offset + 1 + len(scores.ranks)]
        first: list[dict[str, Any] | None] = [None] if offset == 0 else []
        return first + prompt_entries(
            self._model.tokenizer.table, scored, scores, self._job.body.prompt_logprobs
        )

    def rows(self) -> dict[str, Any]:
        """``logits`` and ``hidden_states``, those that there are."""
        rows: dict[str, Any] = {}
        logits = self._job.body.return_logits
        if logits is not None and not self._logits.is_empty:
            caveat = {} if self._model.info.batch_invariant else {"batch_invariant": False}
            rows["logits"] = {"stage": logits.stage, **caveat, **self._logits.finish()}
        if not self._hidden_states.is_empty:
            rows["hidden_states"] = self._hidden_states.finish()
        return rows

    def extras(self) -> dict[str, Any]:
        """``token_ids``, ``logits``, ``hidden_states`` and ``stop_reason``, beyond what OpenAI defines."""
        body = self._job.body
        extras: dict[str, Any] = {"stop_reason": self.stop_reason}
        if body.return_token_ids or body.returns_rows:
            extras["token_ids"] = self.token_ids
        if body.return_token_ids and self.is_first_of_prompt:
            extras["prompt_token_ids"] = self.prompt.token_ids
        return {**extras, **self.rows()}


def _blocks(wanted: RowOptions | None) -> RowBlocks:
    return RowBlocks("base64" if wanted is None else wanted.wire_encoding)
