"""``text_completion``, whole and in chunks, with echo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from logitengine.link.messages import PromptOutput

from logitserve.answers.choices import ChoicesAnswer
from logitserve.answers.logprobs import CompletionLogprobs
from logitserve.answers.record import Record
from logitserve.jobs.job import Job
from logitserve.jobs.prompts import TokenizedPrompt
from logitserve.text.detokenizer import Detokenizer
from logitserve.text.token_table import TokenTable

ECHOED_CHARACTERS = 60_000
"""Characters of an echoed prompt in one event: JSON writes none of them in more than six bytes."""


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt as text, token by token."""

    pieces: list[str]
    offsets: list[int]
    text: str


class CompletionRecord(Record):
    """A choice whose text begins with its prompt where that is echoed.

    Args:
        echo: the prompt's text; None where it is not echoed.
        top: the number of likely tokens shown beside each token; None for no logprobs.
    """

    def __init__(self, job: Job, index: int, echo: Echo | None, top: int | None) -> None:
        table = job.model.tokenizer.table
        first_offset = 0 if echo is None else len(echo.text)
        logprobs = None if top is None else CompletionLogprobs(table, top, first_offset)
        super().__init__(job, index, logprobs)
        self.echo = echo
        self.echo_logprobs = None if top is None or echo is None else CompletionLogprobs(table, top)
        self.echoed_text = ""
        """Text of the prompt tokens whose log-probabilities were added."""
        self._own_logprobs = logprobs

    def add_prompt(self, prompt: PromptOutput) -> None:
        super().add_prompt(prompt)
        echo, logprobs = self.echo, self.echo_logprobs
        if echo is None or logprobs is None:
            return
        start = prompt.offset + 1
        stop = start + (len(prompt.logprobs.ranks) if prompt.logprobs is not None else 0)
        if prompt.offset == 0:
            logprobs.add_first(self.prompt.token_ids[0], echo.offsets[0])
        if prompt.logprobs is not None:
            logprobs.add(self.prompt.token_ids[start:stop], echo.offsets[start:stop], prompt.logprobs)
        self.echoed_text += "".join(echo.pieces[0 if prompt.offset == 0 else start : stop])

    @property
    def nbytes(self) -> int:
        return super().nbytes + (0 if self.echo_logprobs is None else self.echo_logprobs.nbytes)

    def logprobs_after(self, prompt: CompletionLogprobs | None) -> dict[str, Any] | None:
        """Return ``logprobs`` of the choice, those of its echoed prompt first."""
        if prompt is None or self._own_logprobs is None:
            return self.logprobs()
        both = CompletionLogprobs(self._job.model.tokenizer.table, 0)
        both.extend_from(prompt)
        both.extend_from(self._own_logprobs)
        return both.finish()


class CompletionAnswer(ChoicesAnswer[CompletionRecord]):
    """A completions answer.

    With ``echo`` a choice begins with its prompt, with log-probabilities where requested.

    A stream echoes such a prompt in the chunks in which its log-probabilities arrive.
    """

    id_prefix: ClassVar[str] = "cmpl"
    whole_object: ClassVar[str] = "text_completion"
    chunk_object: ClassVar[str] = "text_completion"

    def __init__(self, job: Job) -> None:
        self._top = job.requests[0].logprobs
        table = job.model.tokenizer.table
        self._echoes = [echo(table, prompt) for prompt in job.prompts] if job.answer.echo else None
        super().__init__(job)

    def record(self, index: int) -> CompletionRecord:
        prompt = None if self._echoes is None else self._echoes[index // self.job.n]
        return CompletionRecord(self.job, index, prompt, self._top)

    def opening_choices(self, record: CompletionRecord) -> list[dict[str, Any]]:
        """Return the prompt's ids, and its text unless it is echoed with log-probabilities.

        A long text comes in pieces.
        """
        text = "" if record.echo is None or record.echo_logprobs is not None else record.echo.text
        pieces = [text[start : start + ECHOED_CHARACTERS] for start in range(0, len(text), ECHOED_CHARACTERS)]
        choices = [_choice(record, piece, None) for piece in pieces]
        ids = record.prompt_token_ids()
        return [{**_choice(record, "", None), **ids}, *choices] if ids else choices

    def chunk_choice(self, record: CompletionRecord) -> dict[str, Any]:
        text = record.echoed_text + record.text
        return _choice(record, text, record.logprobs_after(record.echo_logprobs))

    def whole_choice(self, record: CompletionRecord) -> dict[str, Any]:
        text = record.text if record.echo is None else record.echo.text + record.text
        # Every choice repeats the prompt; the engine gives its log-probabilities once, to the prompt's first choice.
        first = self._records[record.index - record.index % self.job.n]
        choice = _choice(record, text, record.logprobs_after(first.echo_logprobs))
        return {**choice, **record.prompt_token_ids()}


def _choice(record: CompletionRecord, text: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "index": record.index,
        "text": text,
        "logprobs": logprobs,
        "finish_reason": record.finish_reason,
        **record.extras(),
        **record.prompt_logprobs(),
    }


def echo(table: TokenTable, prompt: TokenizedPrompt) -> Echo:
    """Return the prompt's text as its tokens spell it.

    Special tokens are included, except one that the tokenizer put first.
    """
    pieces = token_pieces(table, prompt.token_ids)
    if (
        prompt.text is not None
        and prompt.token_ids[0] in table.special_ids
        and "".join(pieces) != prompt.text
    ):
        pieces[0] = ""
    offsets = []
    position = 0
    for piece in pieces:
        offsets.append(position)
        position += len(piece)
    return Echo(pieces, offsets, prompt.text if prompt.text is not None else "".join(pieces))


def token_pieces(table: TokenTable, token_ids: Sequence[int]) -> list[str]:
    """Return each token's part of the whole text."""
    detokenizer = Detokenizer(table, skip_special_tokens=False, at_start=True)
    pieces = [detokenizer.push(token_id) for token_id in token_ids]
    pieces[-1] += detokenizer.finish()
    return pieces
