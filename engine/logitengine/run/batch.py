"""Arrays that the model reads, made from a step's chunks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import numpy as np
import torch
from logitkernels import AttentionMetadata
from numpy.typing import NDArray
from torch import Tensor

from logitengine.schedule.scheduler import Chunk


@dataclass(frozen=True, slots=True)
class ItemRows:
    """Tokens of the batch that stand for a part of an encoder's output.

    Attributes:
        digest: digest of the item.
        first: row of the output that the first of them stands for.
        start, stop: rows of the batch.
    """

    digest: bytes
    first: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Chunks one after another, without padding, on the host.

    Chunk i's tokens are the rows ``starts[i]:starts[i] + num_tokens`` of the flattened batch.

    Attributes:
        drawing: chunks that draw a token, in order. ``drawing_rows`` int64 holds the row from which each
            draws.
        arrays: ``input_ids`` int64 [T]; ``position_ids`` int64 [T], or [3, T] where rotary axes differ;
            ``token_sources`` int32 [T]; and AttentionMetadata's arrays. A token source is the row of the previous step's draw that gives the
            input token, or -1 if ``input_ids`` has it.
        max_query_len, max_seq_len: as in AttentionMetadata.
        awaits_tokens: whether some of ``token_sources`` are not -1.
        item_rows: tokens that stand for outputs of the image encoder. Their ``input_ids`` are 0.
    """

    chunks: list[Chunk]
    starts: list[int]
    drawing: list[Chunk]
    drawing_rows: NDArray[np.int64]
    arrays: dict[str, NDArray[Any]]
    max_query_len: int
    max_seq_len: int
    awaits_tokens: bool
    item_rows: list[ItemRows]

    @property
    def is_decode(self) -> bool:
        """Whether every chunk is one token of text that draws the next. The batch's rows are then the drawing rows."""
        return (
            self.max_query_len == 1
            and len(self.drawing) == len(self.chunks)
            and not self.item_rows
            and self.arrays["position_ids"].ndim == 1
        )

    def padded(self, num_seqs: int, num_blocks: int) -> dict[str, NDArray[Any]]:
        """Pad the arrays of a decode batch to ``num_seqs`` sequences with tables of ``num_blocks`` blocks."""
        padding = self.padding(num_seqs, num_blocks)
        for name, array in self.arrays.items():
            if name == "block_tables":
                padding[name][: array.shape[0], : array.shape[1]] = array
            elif name != "query_start":
                padding[name][: len(array)] = array
        return padding

    @staticmethod
    def padding(num_seqs: int, num_blocks: int) -> dict[str, NDArray[Any]]:
        """Return the arrays of a decode batch of empty sequences: they store nothing and their attention is zero."""
        return {
            "input_ids": np.zeros(num_seqs, dtype=np.int64),
            "position_ids": np.zeros(num_seqs, dtype=np.int64),
            "token_sources": np.full(num_seqs, -1, dtype=np.int32),
            "query_start": np.arange(num_seqs + 1, dtype=np.int32),
            "seq_lens": np.zeros(num_seqs, dtype=np.int32),
            "block_tables": np.zeros((num_seqs, num_blocks), dtype=np.int32),
            "slot_mapping": np.full(num_seqs, -1, dtype=np.int64),
        }


@dataclass(frozen=True, slots=True)
class DeviceBatch:
    """A batch on the device: ``input_ids`` int64 [T], ``position_ids`` int64 [T] or [3, T].

    ``features`` are outputs of the image encoder, [rows, 1 + depth, H], each with the rows of the batch whose embeddings it
    replaces.
    """

    input_ids: Tensor
    position_ids: Tensor
    metadata: AttentionMetadata
    features: Sequence[tuple[slice, Tensor]] = ()

    @classmethod
    def of(
        cls,
        tensors: Mapping[str, Tensor],
        last_tokens: Tensor | None,
        max_query_len: int,
        max_seq_len: int,
        features: Sequence[tuple[slice, Tensor]] = (),
    ) -> DeviceBatch:
        """Build the batch from its arrays on the device, and from the previous step's tokens (int32) if it awaits any.

        A sequence whose draw failed continues with token 0 until the host learns of the failure.
        """
        input_ids, sources = tensors["input_ids"], tensors["token_sources"]
        if last_tokens is not None:
            drawn = last_tokens[sources.clamp(min=0)].clamp(min=0)
            input_ids = torch.where(sources >= 0, drawn, input_ids)
        return cls(
            input_ids=input_ids,
            position_ids=tensors["position_ids"],
            metadata=AttentionMetadata(
                query_start=tensors["query_start"],
                seq_lens=tensors["seq_lens"],
                block_tables=tensors["block_tables"],
                slot_mapping=tensors["slot_mapping"],
                max_query_len=max_query_len,
                max_seq_len=max_seq_len,
                key_ends=tensors.get("key_ends"),
            ),
            features=features,
        )


def build_batch(chunks: list[Chunk], block_size: int) -> Batch:
    # In a decode step, which most steps are, these are a few numbers, for which lists are faster than arrays.
    starts: list[int] = []
    ends = [0]
    input_ids: list[int] = []
    positions: list[int] = []
    item_rows: list[ItemRows] = []
    sources: list[int] = []
    slots: list[int] = []
    for chunk in chunks:
        sequence, covered = chunk.sequence, range(chunk.start, chunk.stop)
        table = sequence.block_table
        starts.append(ends[-1])
        ends.append(ends[-1] + len(covered))
        input_ids += sequence.token_ids[chunk.start : chunk.stop]
        offset = sequence.position_offset
        positions += covered if not offset else range(chunk.start + offset, chunk.stop + offset)
        if chunk.start < sequence.num_prompt_tokens and sequence.prompt.items:
            item_rows += _item_rows(chunk, starts[-1])
        sources += [-1] * len(covered)
        if chunk.stop == sequence.num_tokens and sequence.draw_row is not None:
            sources[-1] = sequence.draw_row
        slots += [table[at // block_size] * block_size + at % block_size for at in covered]
    for rows in item_rows:
        input_ids[rows.start : rows.stop] = [0] * (rows.stop - rows.start)
    tables = np.zeros((len(chunks), max(len(chunk.sequence.block_table) for chunk in chunks)), dtype=np.int32)
    for row, chunk in enumerate(chunks):
        tables[row, : len(chunk.sequence.block_table)] = chunk.sequence.block_table
    draws = [chunk.draws_token for chunk in chunks]
    return Batch(
        chunks=chunks,
        starts=starts,
        drawing=list(compress(chunks, draws)),
        drawing_rows=np.array([end - 1 for end in compress(ends[1:], draws)], dtype=np.int64),
        arrays={
            "input_ids": np.array(input_ids, dtype=np.int64),
            "position_ids": _positions(chunks, starts, positions),
            "token_sources": np.array(sources, dtype=np.int32),
            "query_start": np.array(ends, dtype=np.int32),
            "seq_lens": np.array([chunk.stop for chunk in chunks], dtype=np.int32),
            "block_tables": tables,
            "slot_mapping": np.array(slots, dtype=np.int64),
            **_key_ends(chunks, starts, ends[-1]),
        },
        max_query_len=max(chunk.stop - chunk.start for chunk in chunks),
        max_seq_len=max(chunk.stop for chunk in chunks),
        awaits_tokens=max(sources) >= 0,
        item_rows=item_rows,
    )


def _item_rows(chunk: Chunk, batch_start: int) -> list[ItemRows]:
    rows = []
    for item in chunk.sequence.prompt.items:
        start, stop = max(item.start, chunk.start), min(item.stop, chunk.stop)
        if start < stop:
            shift = batch_start - chunk.start
            rows.append(ItemRows(item.digest, start - item.start, start + shift, stop + shift))
    return rows


def _key_ends(chunks: list[Chunk], starts: list[int], num_tokens: int) -> dict[str, NDArray[np.int32]]:
    """Return AttentionMetadata's ``key_ends`` where a chunk holds tokens of joined items."""
    joining = [
        (chunk, start, item)
        for chunk, start in zip(chunks, starts, strict=True)
        if chunk.sequence.joins_items
        for item in chunk.sequence.prompt.items
        if item.start < chunk.stop and chunk.start < item.stop
    ]
    if not joining:
        return {}
    ends = np.empty(num_tokens, dtype=np.int32)
    for chunk, start in zip(chunks, starts, strict=True):
        ends[start : start + chunk.num_tokens] = np.arange(chunk.start + 1, chunk.stop + 1)
    for chunk, start, item in joining:
        first = start + max(item.start - chunk.start, 0)
        ends[first : start + item.stop - chunk.start] = item.stop
    return {"key_ends": ends}


def _positions(chunks: list[Chunk], starts: list[int], positions: list[int]) -> NDArray[np.int64]:
    """Return the positions of the batch: the given ones, or three rows of them where the axes of a prompt differ."""
    own = np.array(positions, dtype=np.int64)
    differing = [
        (chunk, start)
        for chunk, start in zip(chunks, starts, strict=True)
        if chunk.sequence.positions is not None and chunk.start < chunk.sequence.num_prompt_tokens
    ]
    if not differing:
        return own
    axes = np.tile(own, (3, 1))
    for chunk, start in differing:
        of_prompt = chunk.sequence.positions
        assert of_prompt is not None  # noqa: S101 - that is what differs
        part = of_prompt[:, chunk.start : chunk.stop]
        axes[:, start : start + part.shape[1]] = part
    return axes
