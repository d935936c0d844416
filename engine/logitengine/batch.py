"""A step's chunks, flattened into the tensors that the model reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from logitkernels import AttentionMetadata
from torch import Tensor

from logitengine.scheduler import Chunk


@dataclass(frozen=True, slots=True)
class Batch:
    """The chunks one after another, without padding.

    ``input_ids`` and ``position_ids`` are int64 [1, T]; chunk i's tokens are the rows
    ``starts[i]:starts[i] + len(chunk)`` of the flattened batch.
    """

    chunks: list[Chunk]
    starts: list[int]
    input_ids: Tensor
    position_ids: Tensor
    metadata: AttentionMetadata

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[1]

    def split(self, rows: Tensor) -> Iterator[tuple[Chunk, Tensor]]:
        """Each chunk with its own rows of something [T, ...] that was computed for the batch."""
        for chunk, start in zip(self.chunks, self.starts, strict=True):
            yield chunk, rows[start : start + chunk.stop - chunk.start]

    @property
    def drawing_rows(self) -> list[int]:
        """The rows of the flattened batch that score a next token: the last of each chunk that draws one."""
        return [
            start + chunk.stop - chunk.start - 1
            for chunk, start in zip(self.chunks, self.starts, strict=True)
            if chunk.draws_token
        ]


def build_batch(chunks: list[Chunk], block_size: int, device: torch.device) -> Batch:
    lengths = np.array([chunk.stop - chunk.start for chunk in chunks])
    ends = np.cumsum(lengths)
    starts = ends - lengths
    input_ids = np.concatenate([chunk.sequence.token_ids[chunk.start : chunk.stop] for chunk in chunks])
    positions = np.concatenate([np.arange(chunk.start, chunk.stop) for chunk in chunks])
    tables = np.zeros((len(chunks), max(len(chunk.sequence.block_table) for chunk in chunks)), dtype=np.int32)
    for row, chunk in enumerate(chunks):
        tables[row, : len(chunk.sequence.block_table)] = chunk.sequence.block_table
    owner = np.repeat(np.arange(len(chunks)), lengths)
    slots = tables[owner, positions // block_size].astype(np.int64) * block_size + positions % block_size
    metadata = AttentionMetadata(
        query_start=torch.from_numpy(np.concatenate(([0], ends)).astype(np.int32)).to(device),
        seq_lens=torch.tensor([chunk.stop for chunk in chunks], dtype=torch.int32, device=device),
        block_tables=torch.from_numpy(tables).to(device),
        slot_mapping=torch.from_numpy(slots).to(device),
        max_query_len=int(lengths.max()),
        max_seq_len=max(chunk.stop for chunk in chunks),
    )
    return Batch(
        chunks=chunks,
        starts=starts.tolist(),
        input_ids=torch.from_numpy(input_ids.astype(np.int64))[None].to(device),
        position_ids=torch.from_numpy(positions.astype(np.int64))[None].to(device),
        metadata=metadata,
    )
