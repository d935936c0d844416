"""``text_completion``, whole and in chunks, with echo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from logitserve.answers.answer import Answer
from logitserve.answers.logprobs import CompletionLogprobs
from logitserve.answers.record import Record
from logitserve.jobs.job import Job
from logitserve.jobs.prompts import PreparedPrompt
from logitserve.protocol.completions import CompletionBody
from logitserve.state import Model
from logitserve.text.detokenizer import Detokenizer
from logitserve.text.token_table import TokenTable


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt as text, token by token."""

    pieces: list[str]
    offsets: list[int]
    text: str


class CompletionAnswer(Answer):
    """A completions answer. With ``echo`` a choice begins with its prompt, scored where logprobs are asked for.

    A stream echoes a scored prompt in the chunks in which its scores arrive.
    """

    id_prefix: ClassVar[str] = "cmpl"
    whole_object: ClassVar[str] = "text_completion"
    chunk_object: ClassVar[str] = "text_completion"

    def __init__(self, job: Job, model: Model, body: CompletionBody) -> None:
        super().__init__(job, model)
        self._logprobs = body.logprobs
        self._echoes = [echo(model.tokenizer.table, prompt) for prompt in job.prompts] if body.echo else None

    def chunk_choice(self, record: Record, *, is_first: bool) -> dict[str, Any]:
        text, logprobs = record.text, self._scores()
        shown = self._echo_of(record)
        if shown is not None and logprobs is not None and record.prompt_offset is not None:
            text = self._add_prompt(logprobs, record, shown) + text
        elif shown is not None and self._logprobs is None and is_first:
            text = shown.text + text
        return self._choice(record, text, logprobs, shown)

    def whole_choice(self, record: Record) -> dict[str, Any]:
        text, logprobs = record.text, self._scores()
        shown = self._echo_of(record)
        if shown is not None:
            text = shown.text + text
            if logprobs is not None:
                # Every choice repeats the prompt; the engine scores it once, for the prompt's first choice.
                first = self._records[record.index - record.index % self.job.body.n]
                self._add_prompt(logprobs, first, shown)
        return self._choice(record, text, logprobs, shown)

    def _choice(
        self, record: Record, text: str, logprobs: CompletionLogprobs | None, shown: Echo | None
    ) -> dict[str, Any]:
        if logprobs is not None and self._logprobs is not None:
            base = 0 if shown is None else len(shown.text)
            offsets = [base + offset for offset in record.text_offsets]
            logprobs.add(record.token_ids, offsets, record.logprobs, self._logprobs)
        choice = {
            "index": record.index,
            "text": text,
            "logprobs": None if logprobs is None else logprobs.finish(),
            "finish_reason": record.finish_reason,
            **record.extras(),
        }
        entries = record.prompt_entries()
        return choice if entries is None else {**choice, "prompt_logprobs": entries}

    def _scores(self) -> CompletionLogprobs | None:
        return None if self._logprobs is None else CompletionLogprobs(self.model.tokenizer.table)

    def _echo_of(self, record: Record) -> Echo | None:
        return None if self._echoes is None else self._echoes[record.index // self.job.body.n]

    def _add_prompt(self, logprobs: CompletionLogprobs, record: Record, shown: Echo) -> str:
        """Append the prompt tokens that ``record`` has scores for, the first token of all included; give their text."""
        ids, scores, offset = record.prompt.token_ids, record.prompt_logprobs, record.prompt_offset or 0
        start, stop = offset + 1, offset + 1 + len(scores.ranks)
        if offset == 0:
            logprobs.add_unscored(ids[0], shown.offsets[0])
        logprobs.add(ids[start:stop], shown.offsets[start:stop], scores, self._logprobs or 0)
        return "".join(shown.pieces[0 if offset == 0 else start : stop])


def echo(table: TokenTable, prompt: PreparedPrompt) -> Echo:
    """The prompt's text as its tokens spell it, special tokens included but for one that the tokenizer put first."""
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
    """Each token's part of the text of all."""
    detokenizer = Detokenizer(table, skip_special_tokens=False, at_start=True)
    pieces = [detokenizer.push(token_id) for token_id in token_ids]
    pieces[-1] += detokenizer.finish()
    return pieces
