"""Attention of the sequences with one query in a batch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from logitkernels.attention import AttentionMetadata, AttentionOptions
from logitkernels.triton.attention_tile import (
    AttentionShape,
    attend_tile,
    attended,
    decode_tile,
    empty_state,
    load_rows,
    merge,
    score_factors,
    store_rows,
    tile_rows,
)
from logitkernels.triton.launch import launch

REDUCED_AT_ONCE = 8
"""Splits whose results are loaded together before they are merged one after the other."""


def paged_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    metadata: AttentionMetadata,
    out: Tensor,
    options: AttentionOptions,
    *,
    uniform: bool = False,
) -> None:
    """Compute ``Kernels.paged_attention`` for the sequences with one query; leave other rows of ``out`` unchanged.

    Flash-Decoding (Dao, Haziza, Massa and Sizov 2023): one program per sequence, key-value head and split of
    the sequence's positions. A second kernel merges the splits in order; with a single split the first kernel
    writes the result itself. A sequence of length 0 gets zeros. With ``uniform`` a token's bits equal those
    of `paged_prefill` with ``uniform``. Reads each key and value once; writes and reads ``4 Hq (Dv + 2)``
    bytes per split.

    query [T, Hq, D], caches [num_blocks, Hkv, block_size, D or Dv], of one dtype: float16, bfloat16 or float32;
    out [T, Hq, Dv]. Raises ValueError for tensors that do not fit together.
    """
    shape = AttentionShape.of(query, key_cache, value_cache)
    tile = decode_tile(shape, uniform=uniform, softcap=options.softcap is not None)
    sequences, heads = len(metadata.seq_lens), query.shape[1]
    splits = max(1, -(-metadata.max_seq_len // shape.split))
    partial = stats = None
    if splits > 1:
        partial = query.new_empty(sequences, heads, splits, shape.value_size, dtype=torch.float32)
        stats = query.new_empty(2, sequences, heads, splits, dtype=torch.float32)
    batch = (metadata.query_start, metadata.seq_lens)
    factor, cap = score_factors(options.scale, options.softcap)
    launch(
        _decode_kernel,
        (sequences, tile.head_tiles(shape), splits),
        out,
        partial,
        stats,
        query,
        key_cache,
        value_cache,
        *batch,
        metadata.block_tables,
        options.sinks,
        query.stride(0),
        metadata.block_tables.stride(0),
        factor,
        cap,
        options.sliding_window,
        **tile.constants(shape),
    )
    if splits > 1:
        launch(
            _reduce_kernel,
            (sequences, heads),
            out,
            partial,
            stats,
            *batch,
            options.sinks,
            splits,
            options.sliding_window,
            DV=shape.value_size,
            BLOCK_DV=shape.padded_value_size,
            SPLIT=shape.split,
            AT_ONCE=REDUCED_AT_ONCE,
            num_warps=1,
        )


@triton.jit
def _first_seen(seq_len: tl.tensor, window: tl.tensor) -> tl.tensor:
    """Return the first position that the last token attends to."""
    first = seq_len * 0
    if window is not None:
        first = tl.maximum(seq_len - window, 0)
    return first


@triton.jit(do_not_specialize=["table_stride", "window"])
def _decode_kernel(
    out_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    stats_ptr: tl.tensor,
    query_ptr: tl.tensor,
    key_ptr: tl.tensor,
    value_ptr: tl.tensor,
    query_start_ptr: tl.tensor,
    seq_lens_ptr: tl.tensor,
    tables_ptr: tl.tensor,
    sinks_ptr: tl.tensor,
    query_stride: tl.tensor,
    table_stride: tl.tensor,
    factor: tl.tensor,
    cap: tl.tensor,
    window: tl.tensor,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    SPLIT: tl.constexpr,
) -> None:
    sequence = tl.program_id(0)
    split = tl.program_id(2)
    seq_len = tl.load(seq_lens_ptr + sequence)
    batch_row = tl.load(query_start_ptr + sequence).to(tl.int64)
    first_seen = _first_seen(seq_len, window)
    start = tl.maximum(split * SPLIT, first_seen // BLOCK_N * BLOCK_N)
    limit = tl.minimum(split * SPLIT + SPLIT, seq_len)
    if tl.load(query_start_ptr + sequence + 1) - batch_row != 1:
        return
    if (start >= limit) & (partial_ptr is not None):
        return

    kv_head, tokens, heads, held = tile_rows(tl.program_id(1), BLOCK_M, HEADS, TOKENS, GROUP)
    held &= tokens == 0
    query_ptr += batch_row * query_stride
    query = load_rows(query_ptr, heads * D, held, D, BLOCK_D)
    table_ptr = tables_ptr + sequence.to(tl.int64) * table_stride
    positions = tl.zeros([BLOCK_M], tl.int32) + (seq_len - 1)
    acc, peak, total = empty_state(BLOCK_M, BLOCK_DV)
    for tile_start in range(start, limit, BLOCK_N):
        acc, peak, total = attend_tile(
            acc,
            peak,
            total,
            query,
            positions,
            key_ptr,
            value_ptr,
            table_ptr,
            tile_start,
            limit,
            True,
            factor,
            cap,
            window,
            kv_head,
            KV_HEADS,
            D,
            DV,
            BLOCK_SIZE,
            BLOCK_N,
            BLOCK_D,
            BLOCK_DV,
        )
    if partial_ptr is None:
        result = attended(acc, peak, total, sinks_ptr, heads, held)
        out_ptr += batch_row * (GROUP * KV_HEADS * DV)
        store_rows(out_ptr, heads * DV, result.to(out_ptr.dtype.element_ty), held, DV, BLOCK_DV)
    else:
        splits = tl.num_programs(2).to(tl.int64)
        index = (sequence * (GROUP * KV_HEADS) + heads) * splits + split
        store_rows(partial_ptr, index * DV, acc, held, DV, BLOCK_DV)
        tl.store(stats_ptr + index, peak, mask=held)
        count = tl.num_programs(0) * (GROUP * KV_HEADS) * splits
        tl.store(stats_ptr + count + index, total, mask=held)


@triton.jit(do_not_specialize=["splits", "window"])
def _reduce_kernel(
    out_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    stats_ptr: tl.tensor,
    query_start_ptr: tl.tensor,
    seq_lens_ptr: tl.tensor,
    sinks_ptr: tl.tensor,
    splits: tl.tensor,
    window: tl.tensor,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    SPLIT: tl.constexpr,
    AT_ONCE: tl.constexpr,
) -> None:
    """Merge the splits of one sequence and query head."""
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    seq_len = tl.load(seq_lens_ptr + sequence)
    batch_row = tl.load(query_start_ptr + sequence).to(tl.int64)
    if tl.load(query_start_ptr + sequence + 1) - batch_row != 1:
        return
    first = _first_seen(seq_len, window) // SPLIT
    last = tl.cdiv(seq_len, SPLIT)
    base = (sequence * heads + head).to(tl.int64) * splits
    totals_ptr = stats_ptr + (tl.num_programs(0) * heads).to(tl.int64) * splits
    one = tl.arange(0, 1)
    acc, peak, total = empty_state(1, BLOCK_DV)
    for split in range(first, last, AT_ONCE):
        for ahead in tl.static_range(AT_ONCE):
            index = base + split + ahead + one
            held = split + ahead + one < last
            next_acc = load_rows(partial_ptr, index * DV, held, DV, BLOCK_DV)
            next_peak = tl.load(stats_ptr + index, mask=held, other=float("-inf"))
            next_total = tl.load(totals_ptr + index, mask=held, other=0.0)
            acc, peak, total = merge(acc, peak, total, next_acc, next_peak, next_total)
    held = one == 0
    result = attended(acc, peak, total, sinks_ptr, head + one, held)
    out_rows = (batch_row * heads + head + one) * DV
    store_rows(out_ptr, out_rows, result.to(out_ptr.dtype.element_ty), held, DV, BLOCK_DV)
