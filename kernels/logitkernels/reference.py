"""The operations in plain torch: the reference for every other backend, and the fallback where none of them runs.

Written to be read. Each operation works in float32, or in float64 for float64 input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from logitkernels.attention import AttentionMetadata, AttentionOptions
from logitkernels.interface import Kernels
from logitkernels.weights import Linear, Weight, stack_dense

QUERY_TILE = 64
"""Queries of one sequence that share a gathered copy of its keys and values."""

MAX_SCORES = 1 << 24
"""Attention scores held at once (float32: 64 MiB)."""


class ReferenceLinear(Linear):
    """A weight [N, K] and a bias [N]."""

    def __init__(self, weights: Sequence[Weight], bias: Tensor | None) -> None:
        super().__init__(weights, bias)
        self._weight, self._bias = stack_dense(weights), bias

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x.to(self._weight.dtype), self._weight, self._bias).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class ReferenceKernels(Kernels):
    name = "reference"
    # torch chooses another summation order for another number of rows.
    batch_invariant = False
    honours_key_ends = True

    def pack(
        self,
        weights: Sequence[Weight],
        bias: Tensor | None = None,
        *,
        exact: bool = False,  # noqa: ARG002 - activations take the dtype of the weights
    ) -> ReferenceLinear:
        return ReferenceLinear(weights, bias)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = _wide(x)
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return (normed * weight.to(wide.dtype)).to(x.dtype)

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate) * up

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rotary_dim = cos.shape[-1]
        wide, passed = _wide(x[..., :rotary_dim]), x[..., rotary_dim:]
        first, second = wide.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
        cos, sin = cos.unsqueeze(1).to(wide.dtype), sin.unsqueeze(1).to(wide.dtype)
        return torch.cat(((wide * cos + turned * sin).to(x.dtype), passed), dim=-1)

    def store_kv(
        self, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        block_size = key_cache.shape[2]
        written = slot_mapping >= 0
        block, offset = slot_mapping[written] // block_size, slot_mapping[written] % block_size
        key_cache[block, :, offset] = key[written].to(key_cache.dtype)
        value_cache[block, :, offset] = value[written].to(value_cache.dtype)

    def paged_attention(
        self,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        metadata: AttentionMetadata,
        options: AttentionOptions,
    ) -> Tensor:
        output = query.new_zeros(query.shape[0], query.shape[1], value_cache.shape[-1])
        for tile in _query_tiles(metadata):
            keys = _gather(key_cache, tile.block_tables, query.dtype)
            values = _gather(value_cache, tile.block_tables, query.dtype)
            groups = query.shape[1] // keys.shape[1]
            # [tiles, Hkv, group, rows, D]: the query heads of a group share their keys without a copy.
            queries = _wide(query[tile.rows]).permute(0, 2, 1, 3).unflatten(1, (-1, groups))
            scores = torch.matmul(queries, keys.unsqueeze(2).transpose(-1, -2)) * options.scale
            if options.softcap is not None:
                scores = options.softcap * torch.tanh(scores / options.softcap)
            key_positions = torch.arange(keys.shape[2], device=query.device)
            # A weight of zero does not hide a NaN that another sequence left in the block.
            unseen = key_positions >= tile.key_ends.amax(-1, keepdim=True)
            values = values.masked_fill(unseen[:, None, :, None], 0.0)
            hidden = key_positions >= tile.key_ends[..., None]
            if options.sliding_window is not None:
                hidden |= key_positions <= tile.positions[..., None] - options.sliding_window
            scores = scores.masked_fill(hidden[:, None, None], -torch.inf)
            if options.sinks is not None:
                sink = _wide(options.sinks).view(1, -1, groups, 1, 1).expand(*scores.shape[:-1], 1)
                weights = torch.cat((scores, sink.to(scores.dtype)), dim=-1).softmax(-1)[..., :-1]
            else:
                weights = scores.softmax(-1)
            attended = torch.matmul(weights, values.unsqueeze(2)).flatten(1, 2).permute(0, 2, 1, 3)
            output[tile.rows[tile.is_query]] = attended[tile.is_query].to(query.dtype)
        return output


@dataclass(frozen=True, slots=True)
class _QueryTile:
    """Pieces of several sequences' queries, padded to one length.

    rows: int64 [tiles, rows], indices into the flattened batch (valid also where padded)
    positions: int64 [tiles, rows], positions of the queries
    key_ends: int64 [tiles, rows], positions before which their keys end
    is_query: bool [tiles, rows], False where padded
    block_tables: [tiles, blocks]
    """

    rows: Tensor
    positions: Tensor
    key_ends: Tensor
    is_query: Tensor
    block_tables: Tensor


def _query_tiles(metadata: AttentionMetadata) -> list[_QueryTile]:
    """Cut the batch into tiles: single queries together, longer ones in pieces of QUERY_TILE."""
    query_lens = metadata.query_start.diff().long() * (metadata.seq_lens > 0)
    tiles = []
    for length in sorted({1, min(metadata.max_query_len, QUERY_TILE)}):
        members = query_lens == 1 if length == 1 else query_lens > 1
        sequences = members.nonzero().squeeze(-1)
        if not len(sequences):
            continue
        pieces = -(-query_lens[sequences] // length)
        owner = torch.repeat_interleave(sequences, pieces)
        first_piece = torch.repeat_interleave(pieces.cumsum(0) - pieces, pieces)
        piece = torch.arange(len(owner), device=owner.device) - first_piece
        within = piece[:, None] * length + torch.arange(length, device=owner.device)
        is_query = within < query_lens[owner, None]
        within = within.minimum(query_lens[owner, None] - 1)
        rows = metadata.query_start[:-1].long()[owner, None] + within
        positions = metadata.seq_lens.long()[owner, None] - query_lens[owner, None] + within
        ends = positions + 1 if metadata.key_ends is None else metadata.key_ends[rows].long()
        tables = metadata.block_tables[owner]
        at_once = max(1, MAX_SCORES // (length * metadata.max_seq_len * 16))
        tiles += [
            _QueryTile(*part)
            for part in zip(
                rows.split(at_once),
                positions.split(at_once),
                ends.split(at_once),
                is_query.split(at_once),
                tables.split(at_once),
                strict=True,
            )
        ]
    return tiles


def _gather(cache: Tensor, block_tables: Tensor, dtype: torch.dtype) -> Tensor:
    """Copy [num_blocks, Hkv, block_size, D] into the sequences' order, [tiles, Hkv, positions, D], at least float32."""
    blocks = cache[block_tables.long()].to(torch.float64 if dtype == torch.float64 else torch.float32)
    return blocks.transpose(1, 2).flatten(2, 3)
