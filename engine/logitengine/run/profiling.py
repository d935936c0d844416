"""The step that needs the most memory, run once to measure it."""

from __future__ import annotations

from logitengine.config import EngineConfig
from logitengine.link.messages import GenerationRequest, LogitsSpec, SamplingParams
from logitengine.link.row_bytes import logits_row_nbytes
from logitengine.run.plan import plan_step
from logitengine.run.runner import ModelRunner
from logitengine.run.sampler import Sampler
from logitengine.schedule.scheduler import Chunk
from logitengine.schedule.sequence import Sequence, SequenceState

SHOWN = LogitsSpec(positions="all", stage="processed")
"""Every row over the whole vocabulary, in the widest dtype, for drawn tokens and for the prompt."""


def largest_step(
    runner: ModelRunner, config: EngineConfig, *, longest: int | None, vocab_size: int, can_generate: bool
) -> None:
    """Run a full token budget over as many sequences as may run, none longer than ``longest``, with all rows requested.

    If the model generates, every sequence draws, with filters, and returns its drawn row. The step gives as
    many prompt rows as one step may, and holds the rest of the hidden states. The runner's cache needs one
    block, because nothing that is stored is read.
    """
    count = min(config.max_num_seqs, config.max_num_batched_tokens)
    length = config.max_num_batched_tokens // count
    if longest is not None:
        length = min(length, longest)
    rows_left = (
        0
        if vocab_size is None
        else max(1, config.logits_window_bytes // logits_row_nbytes(SHOWN, vocab_size))
    )
    chunks = []
    for index in range(count):
        sequence = _prompt(index, length, config.block_size, generates=can_generate)
        rows = range(min(length, rows_left) if can_generate else length)
        rows_left -= len(rows)
        chunks.append(Chunk(sequence, 0, length, rows))
    sampler = Sampler(eos_token_ids=[])
    runner.execute(plan_step(chunks, config.block_size, sampler.row))
    for chunk in chunks:
        chunk.sequence.state = SequenceState.FINISHED
    finished = [chunk.sequence for chunk in chunks]
    runner.execute(plan_step([], config.block_size, sampler.row, dropped=finished))


def _prompt(index: int, length: int, block_size: int, *, generates: bool) -> Sequence:
    request = GenerationRequest(
        request_id=str(index),
        prompt_token_ids=[0] * length,
        sampling=SamplingParams(max_tokens=int(generates), top_p=0.9),
        logits=SHOWN if generates else None,
    )
    sequence = Sequence.of(request, 0, index)
    sequence.block_table = [0] * -(-length // block_size)
    return sequence
