"""The logits at given ids and each row's logsumexp, in one pass over the row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from logitkernels.triton.launch import launch
from logitkernels.triton.top_k_logits import check_rows

TILE = 4096
"""Entries of a row that one program sums."""


@triton.jit
def exp_below(x: tl.tensor, largest: tl.tensor) -> tl.tensor:
    """Return ``exp(x - largest)``, which is 1 where both are the same infinity."""
    same = x == largest
    return tl.exp(tl.where(same, 0.0, x) - tl.where(same, 0.0, largest))


@triton.jit
def _sum_kernel(
    logits_ptr: tl.tensor,
    tile_max_ptr: tl.tensor,
    tile_sum_ptr: tl.tensor,
    row_stride: tl.tensor,
    vocab: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    columns = tile * TILE + tl.arange(0, TILE)
    inside = columns < vocab
    x = tl.load(logits_ptr + row * row_stride + columns, mask=inside, other=-float("inf"))
    largest = tl.max(x)
    total = tl.sum(tl.where(inside, exp_below(x, largest), 0.0))
    partial = row * tl.num_programs(1) + tile
    tl.store(tile_max_ptr + partial, largest)
    tl.store(tile_sum_ptr + partial, total)


@triton.jit(do_not_specialize=["num_ids"])
def _gather_kernel(
    logits_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    tile_max_ptr: tl.tensor,
    tile_sum_ptr: tl.tensor,
    values_ptr: tl.tensor,
    logsumexp_ptr: tl.tensor,
    row_stride: tl.tensor,
    num_ids: tl.tensor,
    num_tiles: tl.tensor,
    TILES: tl.constexpr,
    IDS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    tiles = tl.arange(0, TILES)
    inside = tiles < num_tiles
    maxima = tl.load(tile_max_ptr + row * num_tiles + tiles, mask=inside, other=-float("inf"))
    sums = tl.load(tile_sum_ptr + row * num_tiles + tiles, mask=inside, other=0.0)
    largest = tl.max(maxima)
    total = tl.sum(sums.to(tl.float64) * exp_below(maxima, largest).to(tl.float64))
    tl.store(logsumexp_ptr + row, (largest.to(tl.float64) + tl.log(total)).to(tl.float32))
    for start in range(0, num_ids, IDS):
        slots = start + tl.arange(0, IDS)
        wanted = slots < num_ids
        ids = tl.load(ids_ptr + row * num_ids + slots, mask=wanted, other=0)
        values = tl.load(logits_ptr + row * row_stride + ids, mask=wanted)
        tl.store(values_ptr + row * num_ids + slots, values, mask=wanted)


def gather_logits(logits: Tensor, ids: Tensor, *, tile: int = TILE) -> tuple[Tensor, Tensor]:
    """Return ``logits`` float32 [R, V] at ``ids`` int64 [R, K] -> values [R, K], and ``log(sum(exp(row)))`` [R].

    Both are float32. A tile's sum of ``exp(x - max)`` is float32; tiles are joined in float64, in order. A
    row of -inf gives -inf, a row with an inf gives inf, and a row with a NaN gives NaN. Reads R V floats
    once; writes R (2 ceil(V / tile) + K + 1).

    Raises ValueError for logits that are not float32 rows of adjacent entries.
    """
    check_rows(logits)
    rows, vocab = logits.shape
    tiles = triton.cdiv(vocab, tile)
    ids = ids.contiguous()
    tile_max = torch.empty(rows, tiles, dtype=torch.float32, device=logits.device)
    tile_sum = torch.empty_like(tile_max)
    values = torch.empty(ids.shape, dtype=torch.float32, device=logits.device)
    logsumexp = torch.empty(rows, dtype=torch.float32, device=logits.device)
    launch(_sum_kernel, (rows, tiles), logits, tile_max, tile_sum, logits.stride(0), vocab, TILE=tile)
    launch(
        _gather_kernel,
        (rows,),
        logits,
        ids,
        tile_max,
        tile_sum,
        values,
        logsumexp,
        logits.stride(0),
        ids.shape[1],
        tiles,
        TILES=triton.next_power_of_2(tiles),
        IDS=128,
    )
    return values, logsumexp
