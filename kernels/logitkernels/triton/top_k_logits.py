"""Selection of the k largest logits of each row, without sorting the row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from logitkernels.triton.launch import launch

MAX_K = 256
"""Largest k that `top_k_logits` takes."""

TILE = 4096
"""Entries that one program reduces to its best."""

PIVOTS = tl.constexpr(4)
"""Orders at which a search divides its range."""

LOWEST = tl.constexpr(-(1 << 63))
"""Order below that of every entry."""


@triton.jit
def is_nan(x: tl.tensor) -> tl.tensor:
    return (x.to(tl.int32, bitcast=True) & 0x7FFFFFFF) > 0x7F800000


@triton.jit
def order_key(x: tl.tensor) -> tl.tensor:
    """Return an int32 in the order of the floats: -0.0 equals 0.0, and a NaN of either sign lies above infinity."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(is_nan(x), 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def order_of(x: tl.tensor, ids: tl.tensor) -> tl.tensor:
    """Return an int64 that is larger for a larger x and, among equals, for a lower id. It is unique within a row."""
    return (order_key(x).to(tl.int64) << 32) | (0xFFFFFFFF - ids.to(tl.int64))


@triton.jit
def spread(low: tl.tensor, high: tl.tensor) -> tl.tensor:
    """Return PIVOTS orders from low to below high, as far apart as possible; the first is low."""
    step = tl.maximum((high >> 2) - (low >> 2), 1)
    return tl.minimum(low + step * tl.arange(0, PIVOTS), high)


@triton.jit
def _least_kept(orders: tl.tensor, k: tl.tensor) -> tl.tensor:
    """Return an order that exactly k of ``orders`` are at or above, or all but LOWEST if they are k or fewer."""
    is_entry = orders > LOWEST
    highest = tl.max(orders)
    low = tl.min(tl.where(is_entry, orders, highest))
    high = tl.maximum(highest, highest + 1)  # a NaN at id 0 has the highest order of all
    num_kept = tl.sum(is_entry.to(tl.int32))
    while num_kept > k:
        pivots = spread(low, high)
        counts = tl.sum((orders[None, :] >= pivots[:, None]).to(tl.int32), axis=1)
        is_enough = counts >= k
        high = tl.min(tl.where(is_enough, high, pivots))
        low = tl.max(tl.where(is_enough, pivots, low))
        num_kept = tl.min(tl.where(is_enough, counts, num_kept))
    return low


@triton.jit
def _write_sorted(
    best_ptr: tl.tensor,
    logits_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    values_ptr: tl.tensor,
    k: tl.tensor,
    MAX_K: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """Write each of the row's k orders at the rank given by the number of others above it."""
    slots = tl.arange(0, MAX_K)
    orders = tl.load(best_ptr + slots, mask=slots < k, other=LOWEST)
    rank = tl.zeros([MAX_K], tl.int32)
    for start in range(0, k, CHUNK):
        others = start + tl.arange(0, CHUNK)
        others = tl.load(best_ptr + others, mask=others < k, other=LOWEST)
        rank += tl.sum((others[None, :] > orders[:, None]).to(tl.int32), axis=1)
    ids = 0xFFFFFFFF - (orders & 0xFFFFFFFF)
    values = tl.load(logits_ptr + ids, mask=slots < k)
    tl.store(ids_ptr + rank, ids, mask=slots < k)
    tl.store(values_ptr + rank, values, mask=slots < k)


@triton.jit(do_not_specialize=["k"])
def _top_k_kernel(
    logits_ptr: tl.tensor,
    orders_ptr: tl.tensor,
    best_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    values_ptr: tl.tensor,
    row_stride: tl.tensor,
    length: tl.tensor,
    k: tl.tensor,
    TILE: tl.constexpr,
    MAX_K: tl.constexpr,
    CHUNK: tl.constexpr,
    READS_LOGITS: tl.constexpr,
    WRITES_IDS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    logits_ptr += row * row_stride
    best_ptr += (row * tl.num_programs(1) + tile) * k
    columns = tile * TILE + tl.arange(0, TILE)
    inside = columns < length
    if READS_LOGITS:
        x = tl.load(logits_ptr + columns, mask=inside, other=0.0)
        orders = tl.where(inside, order_of(x, columns), LOWEST)
    else:
        orders = tl.load(orders_ptr + row * length + columns, mask=inside, other=LOWEST)
    kept = ((orders > LOWEST) & (orders >= _least_kept(orders, k))).to(tl.int32)
    tl.store(best_ptr + tl.cumsum(kept) - 1, orders, mask=kept != 0)
    slots = tl.arange(0, MAX_K)
    tl.store(best_ptr + slots, LOWEST, mask=(slots >= tl.sum(kept)) & (slots < k))
    if WRITES_IDS:
        tl.debug_barrier()
        _write_sorted(best_ptr, logits_ptr, ids_ptr + row * k, values_ptr + row * k, k, MAX_K, CHUNK)


def top_k_logits(logits: Tensor, k: int, *, tile: int = TILE) -> tuple[Tensor, Tensor]:
    """Return the k largest of each row, descending, ties by lower id: ``logits`` float32 [R, V] -> ids int64,
    values [R, k].

    A NaN comes before every number; -0.0 and 0.0 are equal. Every tile of ``tile`` entries keeps its k best,
    as integers in the order of (value, id). It finds an order with exactly k entries at or above it by
    counting. The same kernel reduces the kept entries until one tile is left, and sorts that tile. Reads R V
    floats once and writes R k ceil(V / tile) integers of 8 bytes.

    Raises ValueError if k is not in 1..min(V, MAX_K), or for logits that are not float32 rows of adjacent entries.
    """
    check_rows(logits)
    rows, vocab = logits.shape
    if not 1 <= k <= min(vocab, MAX_K):
        raise ValueError(f"k is {k}; it must be from 1 to {min(vocab, MAX_K)}")
    if tile < 2 * k:
        raise ValueError(f"tile is {tile}; for k = {k} it must be {2 * k} or more")
    ids = torch.empty(rows, k, dtype=torch.int64, device=logits.device)
    values = torch.empty(rows, k, dtype=logits.dtype, device=logits.device)
    orders, length = ids, vocab
    while True:
        tiles = triton.cdiv(length, tile)
        best = ids.new_empty(rows, tiles * k)
        launch(
            _top_k_kernel,
            (rows, tiles),
            logits,
            orders,
            best,
            ids,
            values,
            logits.stride(0),
            length,
            k,
            TILE=tile,
            MAX_K=MAX_K,
            CHUNK=32,
            READS_LOGITS=orders is ids,
            WRITES_IDS=tiles == 1,
            num_warps=16,
        )
        if tiles == 1:
            return ids, values
        orders, length = best, tiles * k


def check_rows(logits: Tensor) -> None:
    """Raise ValueError unless ``logits`` is float32 [R, V] with adjacent entries of a row; rows may be strided."""
    if logits.dtype != torch.float32 or logits.dim() != 2:
        raise ValueError(
            f"logits are {logits.dtype} with {logits.dim()} dimensions; give float32 [rows, vocab]"
        )
    if logits.stride(1) != 1:
        raise ValueError(f"a row's logits lie {logits.stride(1)} apart; make them contiguous")
