"""Attention of the sequences with several queries in a batch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from logitkernels.attention import AttentionMetadata, AttentionOptions
from logitkernels.triton.attention_tile import (
    AttentionShape,
    attend_tile,
    attended,
    empty_state,
    load_rows,
    merge,
    prefill_tile,
    score_factors,
    store_rows,
    tile_rows,
)
from logitkernels.triton.launch import launch


def paged_prefill(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    metadata: AttentionMetadata,
    out: Tensor,
    options: AttentionOptions,
    *,
    uniform: bool = False,
) -> None:
    """Compute ``Kernels.paged_attention`` for the sequences with several queries; leave other rows of ``out``
    unchanged.

    ``softmax(scale * q k^T) v`` by FlashAttention-2 (Dao 2023) over a paged cache (Kwon et al. 2023). With
    ``uniform`` a token's bits equal those of `paged_decode` with ``uniform``. Reads every query once, and the
    keys and values up to a tile's last token once per tile of ``block_m // (Hq / Hkv)`` tokens. Computes 4 T
    Hq D flops per visible position.

    query [T, Hq, D], caches [num_blocks, Hkv, block_size, D or Dv], of one dtype: float16, bfloat16 or float32;
    out [T, Hq, Dv]. Raises ValueError for tensors that do not fit together.
    """
    shape = AttentionShape.of(query, key_cache, value_cache)
    tile = prefill_tile(shape, uniform=uniform, softcap=options.softcap is not None)
    sequences = len(metadata.seq_lens)
    factor, cap = score_factors(options.scale, options.softcap)
    launch(
        _prefill_kernel,
        (query.shape[0] // tile.tokens(shape) + sequences, tile.head_tiles(shape)),
        out,
        query,
        key_cache,
        value_cache,
        metadata.query_start,
        metadata.seq_lens,
        metadata.block_tables,
        options.sinks,
        sequences,
        query.stride(0),
        metadata.block_tables.stride(0),
        factor,
        cap,
        options.sliding_window,
        **tile.constants(shape),
    )


@triton.jit
def _owner(
    query_start_ptr: tl.tensor, sequences: tl.tensor, tile: tl.tensor, TOKENS: tl.constexpr
) -> tl.tensor:
    """Return the last sequence whose first tile, ``query_start // TOKENS`` plus its index, is not after ``tile``."""
    low, high = tile * 0, sequences - 1
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(query_start_ptr + middle) // TOKENS + middle <= tile:
            low = middle
        else:
            high = middle - 1
    return low


@triton.jit
def _walk(
    acc: tl.tensor,
    peak: tl.tensor,
    total: tl.tensor,
    done_acc: tl.tensor,
    done_peak: tl.tensor,
    done_total: tl.tensor,
    query: tl.tensor,
    positions: tl.tensor,
    key_ptr: tl.tensor,
    value_ptr: tl.tensor,
    table_ptr: tl.tensor,
    start: tl.tensor,
    stop: tl.tensor,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    SPLIT: tl.constexpr,
) -> tl.tensor:
    """Attend to the tiles from ``start`` to ``stop``.

    Returns the state of the split that ``stop`` lies in, and the merged state of all splits before it.
    """
    for tile_start in range(start, stop, BLOCK_N):
        if tile_start % SPLIT == 0:
            done_acc, done_peak, done_total = merge(done_acc, done_peak, done_total, acc, peak, total)
            # A zero that is no constant: a constant would be selected element by element in every iteration.
            acc = tl.full([BLOCK_M, BLOCK_DV], tile_start % SPLIT, tl.float32)
            peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
            total = tl.zeros([BLOCK_M], tl.float32)
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
            MASKED,
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
    return acc, peak, total, done_acc, done_peak, done_total


@triton.jit(do_not_specialize=["sequences", "table_stride", "window"])
def _prefill_kernel(
    out_ptr: tl.tensor,
    query_ptr: tl.tensor,
    key_ptr: tl.tensor,
    value_ptr: tl.tensor,
    query_start_ptr: tl.tensor,
    seq_lens_ptr: tl.tensor,
    tables_ptr: tl.tensor,
    sinks_ptr: tl.tensor,
    sequences: tl.tensor,
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
    # A sequence's last tiles see the most positions. They start first, so that the short ones fill the end.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    sequence = _owner(query_start_ptr, sequences, tile, TOKENS)
    query_start = tl.load(query_start_ptr + sequence)
    query_len = tl.load(query_start_ptr + sequence + 1) - query_start
    first_token = (tile - query_start // TOKENS - sequence) * TOKENS
    if (query_len <= 1) | (first_token >= query_len):
        return

    past = tl.load(seq_lens_ptr + sequence) - query_len
    kv_head, tokens, heads, held = tile_rows(tl.program_id(1), BLOCK_M, HEADS, TOKENS, GROUP)
    held &= first_token + tokens < query_len
    first_row = (query_start + first_token).to(tl.int64)
    query_ptr += first_row * query_stride
    query = load_rows(query_ptr, tokens * query_stride + heads * D, held, D, BLOCK_D)

    table_ptr = tables_ptr + sequence.to(tl.int64) * table_stride
    first_position = past + first_token
    positions = first_position + tokens
    limit = past + tl.minimum(first_token + TOKENS, query_len)
    # In tiles from `all_see` to `diagonal` every row sees every position.
    diagonal = (first_position + 1) // BLOCK_N * BLOCK_N
    acc, peak, total = empty_state(BLOCK_M, BLOCK_DV)
    done_acc, done_peak, done_total = empty_state(BLOCK_M, BLOCK_DV)
    start, all_see = diagonal * 0, diagonal * 0
    if window is not None:
        start = tl.maximum(first_position - window + 1, 0) // BLOCK_N * BLOCK_N
        all_see = tl.minimum(tl.cdiv(tl.maximum(limit - window, 0), BLOCK_N) * BLOCK_N, diagonal)
    for phase in tl.static_range(3):
        stop = all_see if phase == 0 else diagonal if phase == 1 else limit
        if phase > 0 or window is not None:
            acc, peak, total, done_acc, done_peak, done_total = _walk(
                acc,
                peak,
                total,
                done_acc,
                done_peak,
                done_total,
                query,
                positions,
                key_ptr,
                value_ptr,
                table_ptr,
                start,
                stop,
                limit,
                phase != 1,
                factor,
                cap,
                window,
                kv_head,
                KV_HEADS,
                D,
                DV,
                BLOCK_SIZE,
                BLOCK_M,
                BLOCK_N,
                BLOCK_D,
                BLOCK_DV,
                SPLIT,
            )
            start = stop
    acc, peak, total = merge(done_acc, done_peak, done_total, acc, peak, total)
    result = attended(acc, peak, total, sinks_ptr, heads, held)
    out_ptr += first_row * (GROUP * KV_HEADS * DV)
    out_rows = (tokens * (GROUP * KV_HEADS) + heads) * DV
    store_rows(out_ptr, out_rows, result.to(out_ptr.dtype.element_ty), held, DV, BLOCK_DV)
