"""Bytes of the rows that a request asks for: the engine's windows and the server's budgets count in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from logitengine.link.messages import LogitsSpec, OutputSpec

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
ID_BYTES = 4
LOGPROB_BYTES = 8
"""Bytes counted for each number of log-probabilities."""


@dataclass(frozen=True, slots=True)
class RowSize:
    """Bytes of one row of one kind, and the positions that have one."""

    nbytes: int
    of_prompt: bool
    of_generated: bool


def logits_row_nbytes(logits: LogitsSpec, vocab_size: int) -> int:
    """Return the bytes of one row of logits on the wire."""
    item = ITEM_BYTES[logits.dtype]
    if logits.top_k is not None:
        return logits.top_k * (item + ID_BYTES)
    if logits.token_ids is not None:
        return len(logits.token_ids) * (item + ID_BYTES)
    return vocab_size * item


def row_sizes(
    outputs: OutputSpec, vocab_size: int, hidden_size: int, head_sizes: Mapping[str, int]
) -> Iterator[RowSize]:
    """Yield the size of a row of each kind that is asked for. What comes once for a prompt is no row."""
    logits, hidden_states, head = outputs.logits, outputs.hidden_states, outputs.head
    if logits is not None:
        nbytes = logits_row_nbytes(logits, vocab_size)
        yield RowSize(nbytes, logits.wants_prompt, logits.wants_generated)
    if hidden_states is not None:
        nbytes = hidden_size * ITEM_BYTES[hidden_states.dtype]
        yield RowSize(nbytes, hidden_states.wants_prompt, hidden_states.wants_generated)
    if outputs.logprobs is not None:
        yield RowSize(_logprobs_nbytes(outputs.logprobs), of_prompt=False, of_generated=True)
    if outputs.prompt_logprobs is not None:
        yield RowSize(_logprobs_nbytes(outputs.prompt_logprobs), of_prompt=True, of_generated=False)
    if head is not None and head.every_position:
        nbytes = ITEM_BYTES["float32"] * head_sizes[head.name]
        yield RowSize(nbytes, of_prompt=True, of_generated=False)


def prompt_row_nbytes(
    outputs: OutputSpec, vocab_size: int, hidden_size: int, head_sizes: Mapping[str, int]
) -> int:
    """Return the bytes that one prompt row of a request adds; 0 if nothing is sent per row."""
    sizes = row_sizes(outputs, vocab_size, hidden_size, head_sizes)
    return sum(size.nbytes for size in sizes if size.of_prompt)


def _logprobs_nbytes(top: int) -> int:
    """Bytes of a token's own log-probability and rank, and of the ``top`` likeliest tokens' ids and log-probabilities."""
    return LOGPROB_BYTES * (2 + 2 * top)
