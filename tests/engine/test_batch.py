"""Arrays of a batch, against those computed chunk by chunk."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from logitengine.link.messages import GenerationRequest, SamplingParams
from logitengine.run.batch import build_batch
from logitengine.schedule.scheduler import Chunk
from logitengine.schedule.sequence import Sequence

BLOCK_SIZE = 4


@given(
    st.lists(
        st.tuples(st.integers(1, 20), st.integers(0, 5), st.integers(0, 24), st.booleans()),
        min_size=1,
        max_size=6,
    )
)
def test_every_token_finds_its_position_its_slot_and_where_it_comes_from(
    parts: list[tuple[int, int, int, bool]],
) -> None:
    chunks = []
    for arrival, (prompt, generated, cut, is_pending) in enumerate(parts):
        request = GenerationRequest(
            request_id=str(arrival),
            prompt_token_ids=[100 * arrival + i for i in range(prompt)],
            sampling=SamplingParams(max_tokens=6),
        )
        sequence = Sequence.of(request, 0, arrival)
        sequence.token_ids += range(100 * arrival + 50, 100 * arrival + 50 + generated)
        if is_pending and generated:
            sequence.draw_row = arrival
        sequence.block_table = [10 * arrival + i for i in range(8)]
        start = cut % sequence.num_tokens
        stop = sequence.num_tokens if arrival % 2 else min(start + 3, sequence.num_tokens)
        chunks.append(Chunk(sequence, start, stop, range(prompt, prompt)))
    batch = build_batch(chunks, BLOCK_SIZE)
    arrays = batch.arrays
    for row, (chunk, first) in enumerate(zip(chunks, batch.starts, strict=True)):
        sequence = chunk.sequence
        assert arrays["query_start"][row] == first
        assert arrays["seq_lens"][row] == chunk.stop
        np.testing.assert_array_equal(arrays["block_tables"][row], sequence.block_table)
        for place, position in enumerate(range(chunk.start, chunk.stop), start=first):
            assert arrays["input_ids"][place] == sequence.token_ids[position]
            assert arrays["position_ids"][place] == position
            block, offset = divmod(int(arrays["slot_mapping"][place]), BLOCK_SIZE)
            assert (block, offset) == (sequence.block_table[position // BLOCK_SIZE], position % BLOCK_SIZE)
            is_newest = position == sequence.num_tokens - 1
            expected = sequence.draw_row if is_newest and sequence.draw_row is not None else -1
            assert arrays["token_sources"][place] == expected
    drawing = [chunk for chunk in chunks if chunk.draws_token]
    assert batch.drawing == drawing
    ends = {chunk: first + chunk.num_tokens - 1 for chunk, first in zip(chunks, batch.starts, strict=True)}
    assert batch.drawing_rows.tolist() == [ends[chunk] for chunk in drawing]
    assert batch.max_query_len == max(chunk.num_tokens for chunk in chunks)
    assert batch.awaits_tokens == bool((arrays["token_sources"] >= 0).any())
    assert arrays["query_start"][-1] == sum(chunk.num_tokens for chunk in chunks)
