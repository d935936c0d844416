"""Linear layers in which a row's bits do not depend on the other rows.

``out[t, n] = sum_k x[t, k] * weight[n, k] + bias[n]``. K is cut into SPLIT_K parts. Each part is added up in
order of k by the same sequence of tile products; the parts are added in order, then the bias. Tiles and parts
depend only on the weight's shape and dtype.

The number of tokens decides only where the parts are computed. For few tokens each part has programs of its
own, so that every multiprocessor reads weights; a second launch adds their float32 partial sums. For many
tokens one program computes the parts one after the other. Both add the same numbers in the same order.

Bytes moved for few tokens: the weight once. For many: the weight and ``x`` once per group of GROUPED_TILES
row tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from logitkernels.triton.launch import launch

PROGRAMS = 264
"""Programs that keep an H100 reading: two for each of its 132 multiprocessors."""

MIN_PART = 256
"""Elements of K that justify a part of their own."""

MAX_SPLIT_K = 16

GROUPED_TILES = tl.constexpr(16)
"""Row tiles that one column of tiles passes before the next column, while ``x`` stays in the L2 cache."""

REDUCED = 512
"""Output elements of one program that adds partial sums."""


INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@dataclass(frozen=True, slots=True)
class Tile:
    """Tiling of a weight: tiles of the output and of K, the parts of K, and the program's warps and stages."""

    block_m: int
    block_n: int
    block_k: int
    split_k: int
    num_warps: int
    num_stages: int


def tile_for(n: int, k: int, dtype: torch.dtype) -> Tile:
    """Return the tile of a weight [n, k]. It does not depend on the number of tokens."""
    # Rows that begin between 16-byte boundaries are read in small pieces, which take more registers.
    if dtype == torch.float32:
        block_m, block_n, block_k, num_stages = 16, 64, 32, 2 if k % 16 else 3
    elif k % 16:
        block_m, block_n, block_k, num_stages = 64, 64, 32, 2
    elif n < 64:
        block_m, block_n, block_k, num_stages = 64, 16, 64, 5
    elif n < 2048:
        block_m, block_n, block_k, num_stages = 64, 64, 64, 5
    else:
        block_m, block_n, block_k, num_stages = 64, 128, 64, 4
    steps = triton.cdiv(k, block_k)
    split_k = max(1, min(PROGRAMS // triton.cdiv(n, block_n), k // MIN_PART, MAX_SPLIT_K))
    # Every part has whole tiles, and none is empty.
    split_k = triton.cdiv(steps, triton.cdiv(steps, split_k))
    return Tile(block_m, block_n, block_k, split_k, 4, num_stages)


@triton.jit
def _tile_of_program(row_tiles: tl.tensor, column_tiles: tl.tensor) -> tl.tensor:
    """Return row and column of this program's tile: down a group of row tiles, then to the next column."""
    per_group = GROUPED_TILES * column_tiles
    first_row = tl.program_id(0) // per_group * GROUPED_TILES
    rows = tl.minimum(row_tiles - first_row, GROUPED_TILES)
    within = tl.program_id(0) % per_group
    return first_row + within % rows, within // rows


@triton.jit
def _dot(a: tl.tensor, b: tl.tensor, total: tl.tensor) -> tl.tensor:
    # Triton's interpreter would multiply the bits of bfloat16 as integers. It also leaves the order of the
    # sum to BLAS, which chooses it by a row's place; in float64 the difference stays below the last bit.
    if INTERPRETED:
        wide = tl.dot(a.to(tl.float64), b.to(tl.float64), total.to(tl.float64), out_dtype=tl.float64)
        return wide.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def _partial_sum(
    x: tl.tensor,
    weight: tl.tensor,
    x_mask: tl.tensor,
    weight_mask: tl.tensor,
    part: tl.tensor,
    k: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
) -> tl.tensor:
    """Sum one part of K: float32 [BLOCK_M, BLOCK_N] from row pointers [BLOCK_M, 1] and [BLOCK_N, 1]."""
    steps = tl.cdiv(k, BLOCK_K)
    steps_per_part = tl.cdiv(steps, SPLIT_K)
    first = part * steps_per_part
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(first, tl.minimum(first + steps_per_part, steps)):
        columns = (step * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
        x_tile = tl.load(x + columns, mask=x_mask & (columns < k), other=0.0)
        weight_tile = tl.load(weight + columns, mask=weight_mask & (columns < k), other=0.0)
        total = _dot(x_tile, weight_tile.T, total)
    return total


# num_tokens is not specialized on: one compilation multiplies any number of tokens.
@triton.jit(do_not_specialize=["num_tokens"])
def _matmul_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_tokens: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    x_stride: tl.tensor,
    weight_stride: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    SPREAD: tl.constexpr,
) -> None:
    """Write ``out`` [T, n], or with SPREAD float32 [SPLIT_K, T, n], where the grid's second axis is the part of K."""
    row_tile, column_tile = _tile_of_program(tl.cdiv(num_tokens, BLOCK_M), tl.cdiv(n, BLOCK_N))
    rows = row_tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = column_tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    x = x_ptr + rows[:, None] * x_stride
    weight = weight_ptr + columns[:, None] * weight_stride
    x_mask, weight_mask = (rows < num_tokens)[:, None], (columns < n)[:, None]
    if SPREAD:
        part = tl.program_id(1)
        total = _partial_sum(x, weight, x_mask, weight_mask, part, k, BLOCK_M, BLOCK_N, BLOCK_K, SPLIT_K)
        out_ptr += part.to(tl.int64) * num_tokens * n
    else:
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for part in range(SPLIT_K):
            total += _partial_sum(x, weight, x_mask, weight_mask, part, k, BLOCK_M, BLOCK_N, BLOCK_K, SPLIT_K)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
    out = out_ptr + rows[:, None] * n + columns[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=x_mask & (columns < n)[None, :])


@triton.jit(do_not_specialize=["num_tokens"])
def _add_parts_kernel(
    parts_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_tokens: tl.tensor,
    n: tl.tensor,
    SPLIT_K: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Add the partial sums float32 [SPLIT_K, T, n] in order, and the bias -> ``out`` [T, n]."""
    blocks = tl.cdiv(n, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = columns < n
    parts_ptr += row * n
    # The sum starts from zero, as in the program that computes every part: this decides the sign of a zero.
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for _part in tl.static_range(SPLIT_K):
        total += tl.load(parts_ptr + columns, mask=mask, other=0.0)
        parts_ptr += num_tokens.to(tl.int64) * n
    if bias_ptr is not None:
        total += tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * n + columns, total.to(out_ptr.dtype.element_ty), mask=mask)


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x @ weight.T + bias``: ``x`` [T, K], ``weight`` [N, K], ``bias`` [N] -> [T, N] in the dtype of ``x``.

    The sum is accumulated in float32 and rounded once; ``x`` is first rounded to the dtype of ``weight``.
    Rows of both may be strided. A row's bits depend only on the row, the weight and the bias.
    """
    rounded = x.to(weight.dtype)
    rounded = rounded if rounded.stride(-1) == 1 else rounded.contiguous()
    (tokens, k), n = x.shape, weight.shape[0]
    tile = tile_for(n, k, weight.dtype)
    tiles = triton.cdiv(tokens, tile.block_m) * triton.cdiv(n, tile.block_n)
    spread = tile.split_k > 1 and tiles < PROGRAMS // 2
    out = torch.empty(tokens, n, dtype=x.dtype, device=x.device)
    parts = torch.empty(tile.split_k, tokens, n, device=x.device) if spread else out
    launch(
        _matmul_kernel,
        (tiles, tile.split_k if spread else 1),
        rounded,
        weight,
        None if spread else bias,
        parts,
        tokens,
        n,
        k,
        rounded.stride(0),
        weight.stride(0),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        SPLIT_K=tile.split_k,
        SPREAD=spread,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if spread:
        block = min(REDUCED, triton.next_power_of_2(n))
        grid = (tokens * triton.cdiv(n, block),)
        launch(_add_parts_kernel, grid, parts, bias, out, tokens, n, SPLIT_K=tile.split_k, BLOCK=block)
    return out
