"""Shared parts of paged prefill and paged decode: tile sizes, and a step of the online softmax over the paged cache.

Both cut a sequence's positions into the same splits and the splits into the same tiles, whatever the batch.
Each split has an online softmax of its own (Milakov and Gimelshein 2018; Dao et al. 2022, "FlashAttention"),
and ``merge`` joins finished splits in order. A tile or split that is hidden from a row leaves the bits of
that row's state unchanged. So a token's result does not depend on where its chunk begins or on the other rows
of its tile.

The rows of a tile are the pairs (token, query head) of one key-value head, tokens first. Keys and values are
read once for all the query heads that share them. A row's state is float32: ``acc`` (the weighted sum of
values), ``peak`` (the largest score) and ``total`` (the sum of weights). Scores are in units of log 2, so
that weights are powers of two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.runtime.driver import driver

INTERPRETED = tl.constexpr(knobs.runtime.interpret)

LARGEST_BLOCK_N = 64
SMALLEST_BLOCK = 16
"""Rows and positions of the smallest tile that matrix instructions take."""


def _padded(size: int) -> int:
    """Return the size of the tile dimension that holds ``size``."""
    return max(SMALLEST_BLOCK, 1 << (size - 1).bit_length())


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Shape parameters of the model. None comes from the batch, so tile sizes cannot depend on it."""

    group: int
    kv_heads: int
    head_size: int
    value_size: int
    block_size: int
    dtype: torch.dtype

    @classmethod
    def of(cls, query: Tensor, key_cache: Tensor, value_cache: Tensor) -> AttentionShape:
        """Raise ValueError for tensors that the kernels cannot read in place."""
        _, kv_heads, block_size, head_size = key_cache.shape
        if query.shape[1] % kv_heads or query.shape[2] != head_size:
            raise ValueError(
                f"query {tuple(query.shape)} does not fit the key cache {tuple(key_cache.shape)}"
            )
        if value_cache.shape[:3] != key_cache.shape[:3]:
            raise ValueError(f"caches differ: {tuple(key_cache.shape)} and {tuple(value_cache.shape)}")
        if not query.dtype == key_cache.dtype == value_cache.dtype:
            raise ValueError(f"query is {query.dtype}, caches are {key_cache.dtype} and {value_cache.dtype}")
        if not (key_cache.is_contiguous() and value_cache.is_contiguous()):
            raise ValueError("the caches must be contiguous")
        if query.stride(2) != 1 or query.stride(1) != head_size:
            raise ValueError("the heads of a query must lie one after the other")
        return cls(
            query.shape[1] // kv_heads, kv_heads, head_size, value_cache.shape[3], block_size, query.dtype
        )

    @property
    def padded_head_size(self) -> int:
        return _padded(self.head_size)

    @property
    def padded_value_size(self) -> int:
        return _padded(self.value_size)

    @property
    def widest(self) -> int:
        return max(self.padded_head_size, self.padded_value_size)

    @property
    def is_exact(self) -> bool:
        """Whether products are float32 and summed without matrix instructions."""
        return self.dtype == torch.float32

    @property
    def block_n(self) -> int:
        """Positions of a tile: 16 KiB of keys, so that two stages fit. Float32 is unrolled and takes fewer."""
        elements = 2048 if self.is_exact else 8192
        return max(SMALLEST_BLOCK, min(LARGEST_BLOCK_N, elements // self.widest))

    @property
    def split(self) -> int:
        """Positions of a split: a multiple of ``block_n``."""
        return 512 if self.widest <= 128 else 256

    def constants(self) -> dict[str, int]:
        """Return the constants that every kernel takes."""
        return {
            "GROUP": self.group,
            "KV_HEADS": self.kv_heads,
            "D": self.head_size,
            "DV": self.value_size,
            "BLOCK_SIZE": self.block_size,
            "BLOCK_N": self.block_n,
            "BLOCK_D": self.padded_head_size,
            "BLOCK_DV": self.padded_value_size,
            "SPLIT": self.split,
        }


@dataclass(frozen=True, slots=True)
class RowTile:
    """Rows of a program, and the warps, pipeline stages and registers that it is compiled for.

    Without ``maxnreg`` ptxas may spill a few registers to fit one more block on an SM.
    """

    block_m: int
    num_warps: int
    num_stages: int = 3
    maxnreg: int | None = None

    def heads(self, shape: AttentionShape) -> int:
        """Return the query heads of a tile: those of one key-value head, or as many as there are rows."""
        return min(shape.group, self.block_m)

    def tokens(self, shape: AttentionShape) -> int:
        return self.block_m // self.heads(shape)

    def head_tiles(self, shape: AttentionShape) -> int:
        return shape.kv_heads * -(-shape.group // self.heads(shape))

    def constants(self, shape: AttentionShape) -> dict[str, Any]:
        """Return the constants and launch options that every kernel takes."""
        return {
            "HEADS": self.heads(shape),
            "TOKENS": self.tokens(shape),
            "BLOCK_M": self.block_m,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "maxnreg": self.maxnreg,
            **shape.constants(),
        }


ROWS = {9: {64: 128, 128: 128, 256: 64}, 10: {64: 128, 128: 64, 256: 32}, 8: {64: 32, 128: 32, 256: 16}}
"""Rows of a prefill tile by GPU generation and padded head size, such that two accumulators stay in registers."""

SOFTCAP_ROWS = {9: 64, 10: 32, 8: 32}
"""Rows of a prefill tile by GPU generation with a softcap, for padded heads of 128."""


def prefill_tile(shape: AttentionShape, *, uniform: bool, softcap: bool) -> RowTile:
    """Return the largest tile that does not spill; at most 64 rows where `paged_decode` shares it.

    A softcap takes registers for a second copy of the scores.
    """
    if shape.is_exact:
        return RowTile(32 if shape.widest <= 128 else 16, 8, maxnreg=255)
    generation = _generation()
    rows = ROWS[generation][max(64, shape.widest)]
    if softcap and shape.widest == 128:
        rows = min(rows, SOFTCAP_ROWS[generation])
    if (uniform or softcap) and rows >= 64:
        return RowTile(64, 4 if shape.widest <= 128 else 8, maxnreg=255)
    return RowTile(rows, 4 if generation == 8 else 8, maxnreg=255)


def decode_tile(shape: AttentionShape, *, uniform: bool, softcap: bool) -> RowTile:
    """Return the smallest tile that holds the query heads of a key-value head."""
    if uniform:
        return prefill_tile(shape, uniform=True, softcap=softcap)
    if shape.is_exact:
        return RowTile(SMALLEST_BLOCK, 4 if shape.widest <= 128 else 8, maxnreg=255)
    return RowTile(min(64 if shape.widest <= 128 else 32, _padded(shape.group)), 4)


def _generation() -> int:
    """Return the generation of matrix instructions: 9 (sm_90), 10 (sm_100), or 8 (sm_80) for all other GPUs."""
    if INTERPRETED.value:
        return 9
    generation: int = driver.active.get_current_target().arch // 10
    return generation if generation in ROWS else 8


def score_factors(scale: float, softcap: float | None) -> tuple[float, float | None]:
    """Return the factor of a query-key product and that of its tanh, such that scores are in units of log 2."""
    if softcap is None:
        return scale * math.log2(math.e), None
    return scale / softcap, softcap * math.log2(math.e)


@triton.jit
def tile_rows(
    head_tile: tl.tensor,
    BLOCK_M: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
) -> tl.tensor:
    """Return the tile's key-value head, and for each row its token, its query head and whether the row is used.

    Tokens are counted from the tile's first.
    """
    rows = tl.arange(0, BLOCK_M)
    parts: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    kv_head = head_tile // parts
    in_group = head_tile % parts * HEADS + rows % HEADS
    held = (in_group < GROUP) & (rows < TOKENS * HEADS)
    return kv_head, rows // HEADS, kv_head * GROUP + in_group, held


@triton.jit
def load_rows(
    base_ptr: tl.tensor, offsets: tl.tensor, held: tl.tensor, WIDTH: tl.constexpr, BLOCK: tl.constexpr
) -> tl.tensor:
    """Load rows of WIDTH elements at ``offsets`` [rows] -> [rows, BLOCK]; 0 beyond WIDTH and where not ``held``."""
    columns = tl.arange(0, BLOCK)
    mask = held[:, None]
    if WIDTH != BLOCK:
        mask &= columns[None, :] < WIDTH
    return tl.load(base_ptr + offsets[:, None] + columns[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(
    base_ptr: tl.tensor,
    offsets: tl.tensor,
    rows: tl.tensor,
    held: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    columns = tl.arange(0, BLOCK)
    mask = held[:, None]
    if WIDTH != BLOCK:
        mask &= columns[None, :] < WIDTH
    tl.store(base_ptr + offsets[:, None] + columns[None, :], rows, mask=mask)


@triton.jit
def empty_state(BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr) -> tl.tensor:
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    return acc, peak, tl.zeros([BLOCK_M], tl.float32)


@triton.jit
def finite_base(peak: tl.tensor) -> tl.tensor:
    """Return the number to subtract from scores: 0 where all are -inf, so that weights are 0 and not NaN."""
    return tl.where(peak == float("-inf"), 0.0, peak)


@triton.jit
def dot(a: tl.tensor, b: tl.tensor, total: tl.tensor) -> tl.tensor:
    # Triton's interpreter would multiply the bits of bfloat16 as integers.
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def capped(x: tl.tensor, cap: tl.tensor) -> tl.tensor:
    """Return ``cap * tanh(x)``, by a power that cannot overflow."""
    power = tl.exp2(tl.abs(x) * -2.8853900817779268)  # exp(-2 |x|)
    size = cap * ((1.0 - power) / (1.0 + power))
    return tl.where(x < 0.0, -size, size)


@triton.jit
def attend_tile(
    acc: tl.tensor,
    peak: tl.tensor,
    total: tl.tensor,
    query: tl.tensor,
    positions: tl.tensor,
    key_ptr: tl.tensor,
    value_ptr: tl.tensor,
    table_ptr: tl.tensor,
    start: tl.tensor,
    limit: tl.tensor,
    MASKED: tl.constexpr,
    factor: tl.tensor,
    cap: tl.tensor,
    window: tl.tensor,
    kv_head: tl.tensor,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
) -> tl.tensor:
    """Return the state of rows at ``positions`` after the BLOCK_N positions from ``start``.

    Positions at or above ``limit`` do not exist. MASKED says whether some row must not see all positions of
    the tile.
    """
    slots = start + tl.arange(0, BLOCK_N)
    held = slots < limit if MASKED else tl.full([BLOCK_N], True, tl.int1)
    blocks = tl.load(table_ptr + slots // BLOCK_SIZE, mask=held, other=0).to(tl.int64)
    cache_rows = (blocks * KV_HEADS + kv_head) * BLOCK_SIZE + slots % BLOCK_SIZE

    keys = load_rows(key_ptr, cache_rows * D, held, D, BLOCK_D)
    scores = dot(query, tl.trans(keys), tl.zeros([query.shape[0], BLOCK_N], tl.float32)) * factor
    if cap is not None:
        scores = capped(scores, cap)
    if MASKED:
        age = positions[:, None] - slots[None, :]
        # As an unsigned number, a negative age is beyond any window.
        seen = age >= 0 if window is None else age.to(tl.uint32) < window.to(tl.uint32)
        scores = tl.where(seen, scores, float("-inf"))

    next_peak = tl.maximum(peak, tl.max(scores, 1))
    base = finite_base(next_peak)
    kept = tl.exp2(peak - base)
    weights = tl.exp2(scores - base[:, None])
    values = load_rows(value_ptr, cache_rows * DV, held, DV, BLOCK_DV)
    acc = dot(weights.to(values.dtype), values, acc * kept[:, None])
    return acc, next_peak, total * kept + tl.sum(weights, 1)


@triton.jit
def merge(
    acc: tl.tensor,
    peak: tl.tensor,
    total: tl.tensor,
    next_acc: tl.tensor,
    next_peak: tl.tensor,
    next_total: tl.tensor,
) -> tl.tensor:
    """Return the joint state of two neighbouring splits; exact where one of them is empty."""
    both = tl.maximum(peak, next_peak)
    base = finite_base(both)
    kept = tl.exp2(peak - base)
    added = tl.exp2(next_peak - base)
    return acc * kept[:, None] + next_acc * added[:, None], both, total * kept + next_total * added


@triton.jit
def attended(
    acc: tl.tensor, peak: tl.tensor, total: tl.tensor, sinks_ptr: tl.tensor, heads: tl.tensor, held: tl.tensor
) -> tl.tensor:
    """Return the weighted mean of the values; a sink joins the sum of weights. Zero for a row that saw nothing."""
    if sinks_ptr is not None:
        sinks = (
            tl.load(sinks_ptr + heads, mask=held, other=0.0).to(tl.float32) * 1.4426950408889634
        )  # log2(e)
        both = tl.maximum(peak, sinks)
        base = finite_base(both)
        kept = tl.exp2(peak - base)
        acc = acc * kept[:, None]
        total = total * kept + tl.exp2(sinks - base)
    return acc / tl.where(total == 0.0, 1.0, total)[:, None]
