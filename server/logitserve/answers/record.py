"""Record of one choice: of a single delta for a chunk, of all deltas for a whole answer."""

from __future__ import annotations

from typing import Any

from logitengine.link.messages import LogitsRows, PromptOutput

from logitserve.answers.logprobs import LogprobsWriter, PromptLogprobs
from logitserve.answers.row_blocks import RowBlocks
from logitserve.jobs.job import Job
from logitserve.text.choice import Delta
from logitserve.text.parser import Content, TextPart


class Record:
    """Collects deltas of one choice; rows and log-probabilities are written as they come.

    Args:
        logprobs: writer of the generated tokens' log-probabilities; None where the answer has none.
    """

    def __init__(self, job: Job, index: int, logprobs: LogprobsWriter | None = None) -> None:
        self._job = job
        self._request = job.requests[index // job.n]
        self.index = index
        self.prompt = job.prompts[index // job.n]
        self.is_first_of_prompt = index % job.n == 0
        self._text: list[str] = []
        self.token_ids: list[int] = []
        self._logprobs = logprobs
        top = job.answer.prompt_logprobs
        self._prompt_logprobs = None if top is None else PromptLogprobs(job.model.tokenizer.table, top)
        self._has_prompt = False
        self._logits = RowBlocks(job.answer.logits_encoding)
        self._hidden_states = RowBlocks(job.answer.hidden_states_encoding)
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None

    def add(self, delta: Delta) -> int:
        """Take in a delta and return the bytes by which the record grew."""
        before = self.nbytes
        for part in delta.parts:
            if isinstance(part, Content):
                self._text.append(part.text)
            else:
                self.add_part(part)
        self.token_ids += delta.token_ids
        if delta.logprobs is not None and self._logprobs is not None:
            self._logprobs.add(delta.token_ids, delta.text_offsets, delta.logprobs)
        if delta.logits is not None:
            self._logits.add_generated(delta.logits)
        if delta.hidden_states is not None:
            self._hidden_states.add_generated(LogitsRows(values=delta.hidden_states))
        if delta.prompt is not None:
            self.add_prompt(delta.prompt)
        self.finish_reason = delta.finish_reason
        self.stop_reason = delta.stop_reason
        return self.nbytes - before

    def add_part(self, part: TextPart) -> None:
        """Take in a part that is not content. Raises TypeError, since only chats have such parts."""
        raise TypeError(type(part).__name__)

    def add_prompt(self, prompt: PromptOutput) -> None:
        """Take in rows of the choice's prompt."""
        self._has_prompt = True
        if prompt.logits is not None:
            self._logits.add_prompt(prompt.logits, prompt.offset)
        if prompt.hidden_states is not None:
            self._hidden_states.add_prompt(LogitsRows(values=prompt.hidden_states), prompt.offset)
        if self._prompt_logprobs is None:
            return
        if prompt.offset == 0:
            self._prompt_logprobs.add_first()
        if prompt.logprobs is not None:
            following = self.prompt.token_ids[prompt.offset + 1 :][: len(prompt.logprobs.ranks)]
            self._prompt_logprobs.add(following, prompt.logprobs)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows and log-probabilities held."""
        writers = (self._logprobs, self._prompt_logprobs, self._logits, self._hidden_states)
        return sum(writer.nbytes for writer in writers if writer is not None)

    @property
    def text(self) -> str:
        return "".join(self._text)

    def logprobs(self) -> dict[str, Any] | None:
        """``logprobs`` of the choice."""
        return None if self._logprobs is None else self._logprobs.finish()

    def prompt_logprobs(self) -> dict[str, Any]:
        """The member ``prompt_logprobs``, if there is one."""
        if self._prompt_logprobs is None or not self._has_prompt:
            return {}
        return {"prompt_logprobs": self._prompt_logprobs.finish()}

    def prompt_token_ids(self) -> dict[str, Any]:
        """The member ``prompt_token_ids``, which comes once, with the first choice of a prompt."""
        if self._job.answer.return_token_ids and self.is_first_of_prompt:
            return {"prompt_token_ids": self.prompt.token_ids}
        return {}

    def rows(self) -> dict[str, Any]:
        """The members ``logits`` and ``hidden_states``, if there are any."""
        rows: dict[str, Any] = {}
        logits = self._request.logits
        if logits is not None and not self._logits.is_empty:
            caveat = {} if self._job.model.info.batch_invariant else {"batch_invariant": False}
            rows["logits"] = {"stage": logits.stage, **caveat, **self._logits.finish()}
        if not self._hidden_states.is_empty:
            rows["hidden_states"] = self._hidden_states.finish()
        return rows

    def extras(self) -> dict[str, Any]:
        """``token_ids``, ``logits``, ``hidden_states`` and ``stop_reason``, beyond what OpenAI defines."""
        job = self._job
        extras: dict[str, Any] = {"stop_reason": self.stop_reason}
        if job.answer.return_token_ids or job.returns_rows:
            extras["token_ids"] = self.token_ids
        return {**extras, **self.rows()}
