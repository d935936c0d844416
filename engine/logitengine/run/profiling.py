"""The step that takes the most memory, run once to see how much that is."""

from __future__ import annotations

from logitkernels.sampling import RowSampling

from logitengine.config import EngineConfig
from logitengine.link.messages import GenerationRequest, SamplingParams
from logitengine.run.batch import build_batch
from logitengine.run.reporter import HEAD_ROWS
from logitengine.run.runner import ModelRunner
from logitengine.schedule.scheduler import Chunk
from logitengine.schedule.sequence import Sequence


def largest_step(
    runner: ModelRunner, config: EngineConfig, *, longest: int | None, can_generate: bool
) -> None:
    """A full token budget over as many sequences as may run, none longer than ``longest``, with every row asked for.

    Where the model generates, all draw, filtered, every drawn row is shown in its widest dtype, and so are as many prompt
    rows as go through the head at once. The runner's cache needs one block: what is computed is never read.
    """
    count = min(config.max_num_seqs, config.max_num_batched_tokens)
    length = config.max_num_batched_tokens // count
    if longest is not None:
        length = min(length, longest)
    chunks = [
        Chunk(_prompt(index, length, config.block_size, int(can_generate)), 0, length)
        for index in range(count)
    ]
    row = RowSampling(
        temperature=1.0,
        top_k=0,
        top_p=0.9,
        min_p=0.0,
        seed=0,
        stream=0,
        position=length,
        shows_processed=True,
    )
    computed = runner.execute(build_batch(chunks, config.block_size), [row] * count if can_generate else [])
    if can_generate:
        drawn = computed.logits.clone()
        prompt = runner.head(computed.hidden[:HEAD_ROWS]).clone()
        del drawn, prompt


def _prompt(index: int, length: int, block_size: int, max_tokens: int) -> Sequence:
    request = GenerationRequest(
        request_id=str(index),
        prompt_token_ids=[0] * length,
        sampling=SamplingParams(max_tokens=max_tokens),
    )
    sequence = Sequence(request, 0, index)
    sequence.block_table = [0] * -(-length // block_size)
    return sequence
