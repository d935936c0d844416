"""Stores of keys and values to their slots of the paged cache, alone or after the norms and the rotary embedding.

Every program moves some heads of one token. The slot of a token is ``block * block_size + offset``; a
negative slot stores nothing. Caches are [num_blocks, Hkv, block_size, D]. Each input is read once and each
output written once, in one launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from logitkernels.triton.launch import launch

ELEMENTS = 1024
"""Elements of a tensor that one program moves. Few, so that one token of a decode takes several programs."""


@triton.jit
def _slot_heads(
    cache_ptr: tl.tensor,
    slot: tl.tensor,
    heads: tl.tensor,
    block_stride: tl.tensor,
    head_stride: tl.tensor,
    row_stride: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
) -> tl.tensor:
    """Return pointers [HEADS, 1] to the heads of the token in ``slot``."""
    start = slot // BLOCK_SIZE * block_stride + slot % BLOCK_SIZE * row_stride
    return cache_ptr + start + heads * head_stride


@triton.jit
def _copy_heads(
    source: tl.tensor, target: tl.tensor, kept: tl.tensor, D: tl.constexpr, BLOCK_D: tl.constexpr
) -> None:
    """Copy D elements from each pointer [HEADS, 1] of ``source`` to ``target`` where ``kept`` [HEADS, 1]."""
    columns = tl.arange(0, BLOCK_D)[None, :]
    mask = kept & (columns < D)
    x = tl.load(source + columns, mask=mask)
    tl.store(target + columns, x.to(target.dtype.element_ty), mask=mask)


@triton.jit
def _scale(
    x: tl.tensor, factor: tl.tensor, weight_ptr: tl.tensor, columns: tl.tensor, end: tl.tensor
) -> tl.tensor:
    """Norm a part of the heads, rounded to the dtype of ``x`` as a separate norm would."""
    weight = tl.load(weight_ptr + columns, mask=columns < end, other=0.0).to(tl.float32)
    return (x.to(tl.float32) * factor * weight).to(x.dtype)


@triton.jit
def _turn_heads(
    source: tl.tensor,
    target: tl.tensor,
    kept: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    norm_ptr: tl.tensor,
    eps: tl.tensor,
    D: tl.constexpr,
    ROTARY: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
) -> None:
    """Norm and rotate the heads at ``source`` [HEADS, 1]; ``cos``, ``sin`` [1, HALF_BLOCK].

    Without ``norm_ptr`` there is no norm.
    """
    HALF: tl.constexpr = ROTARY // 2
    columns = tl.arange(0, HALF_BLOCK)[None, :]
    rest_columns = ROTARY + tl.arange(0, REST_BLOCK)[None, :]
    mask = kept & (columns < HALF)
    rest_mask = kept & (rest_columns < D)
    dtype: tl.constexpr = source.dtype.element_ty
    first = tl.load(source + columns, mask=mask, other=0.0)
    second = tl.load(source + HALF + columns, mask=mask, other=0.0)
    if ROTARY < D:
        rest = tl.load(source + rest_columns, mask=rest_mask, other=0.0)
    if norm_ptr is not None:
        first_wide, second_wide = first.to(tl.float32), second.to(tl.float32)
        squares = tl.sum(first_wide * first_wide + second_wide * second_wide, axis=1, keep_dims=True)
        if ROTARY < D:
            rest_wide = rest.to(tl.float32)
            squares += tl.sum(rest_wide * rest_wide, axis=1, keep_dims=True)
        factor = tl.rsqrt(squares / D + eps)
        first = _scale(first, factor, norm_ptr, columns, HALF)
        second = _scale(second, factor, norm_ptr + HALF, columns, HALF)
        if ROTARY < D:
            rest = _scale(rest, factor, norm_ptr, rest_columns, D)
    first_wide, second_wide = first.to(tl.float32), second.to(tl.float32)
    turned = (first_wide * cos - second_wide * sin).to(dtype)
    tl.store(target + columns, turned.to(target.dtype.element_ty), mask=mask)
    turned = (second_wide * cos + first_wide * sin).to(dtype)
    tl.store(target + HALF + columns, turned.to(target.dtype.element_ty), mask=mask)
    if ROTARY < D:
        tl.store(target + rest_columns, rest.to(target.dtype.element_ty), mask=rest_mask)


@triton.jit
def _store_kv_kernel(
    key_ptr: tl.tensor,
    value_ptr: tl.tensor,
    key_cache_ptr: tl.tensor,
    value_cache_ptr: tl.tensor,
    slot_ptr: tl.tensor,
    key_stride: tl.tensor,
    key_head_stride: tl.tensor,
    value_stride: tl.tensor,
    value_head_stride: tl.tensor,
    key_block_stride: tl.tensor,
    key_cache_head_stride: tl.tensor,
    key_row_stride: tl.tensor,
    value_block_stride: tl.tensor,
    value_cache_head_stride: tl.tensor,
    value_row_stride: tl.tensor,
    KV_HEADS: tl.constexpr,
    KEY_D: tl.constexpr,
    VALUE_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
) -> None:
    GROUPS: tl.constexpr = (KV_HEADS + HEADS - 1) // HEADS
    token = (tl.program_id(0) // GROUPS).to(tl.int64)
    heads = (tl.program_id(0) % GROUPS * HEADS + tl.arange(0, HEADS)).to(tl.int64)[:, None]
    slot = tl.load(slot_ptr + token)
    kept = heads < tl.where(slot >= 0, KV_HEADS, 0)
    key_target = _slot_heads(
        key_cache_ptr, slot, heads, key_block_stride, key_cache_head_stride, key_row_stride, BLOCK_SIZE
    )
    value_target = _slot_heads(
        value_cache_ptr,
        slot,
        heads,
        value_block_stride,
        value_cache_head_stride,
        value_row_stride,
        BLOCK_SIZE,
    )
    key = key_ptr + token * key_stride + heads * key_head_stride
    value = value_ptr + token * value_stride + heads * value_head_stride
    _copy_heads(key, key_target, kept, KEY_D, KEY_BLOCK)
    _copy_heads(value, value_target, kept, VALUE_D, VALUE_BLOCK)


@triton.jit
def _rope_and_store_kernel(
    query_ptr: tl.tensor,
    key_ptr: tl.tensor,
    value_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    out_ptr: tl.tensor,
    key_cache_ptr: tl.tensor,
    value_cache_ptr: tl.tensor,
    slot_ptr: tl.tensor,
    q_norm_ptr: tl.tensor,
    k_norm_ptr: tl.tensor,
    eps: tl.tensor,
    query_stride: tl.tensor,
    query_head_stride: tl.tensor,
    key_stride: tl.tensor,
    key_head_stride: tl.tensor,
    value_stride: tl.tensor,
    value_head_stride: tl.tensor,
    cos_stride: tl.tensor,
    sin_stride: tl.tensor,
    key_block_stride: tl.tensor,
    key_cache_head_stride: tl.tensor,
    key_row_stride: tl.tensor,
    value_block_stride: tl.tensor,
    value_cache_head_stride: tl.tensor,
    value_row_stride: tl.tensor,
    QUERY_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    ROTARY: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    QUERY_GROUPS: tl.constexpr = (QUERY_HEADS + HEADS - 1) // HEADS
    GROUPS: tl.constexpr = QUERY_GROUPS + (KV_HEADS + HEADS - 1) // HEADS
    token = (tl.program_id(0) // GROUPS).to(tl.int64)
    group = tl.program_id(0) % GROUPS
    columns = tl.arange(0, HALF_BLOCK)[None, :]
    cos = tl.load(cos_ptr + token * cos_stride + columns, mask=columns < ROTARY // 2, other=0.0)
    sin = tl.load(sin_ptr + token * sin_stride + columns, mask=columns < ROTARY // 2, other=0.0)
    if group < QUERY_GROUPS:
        heads = (group * HEADS + tl.arange(0, HEADS)).to(tl.int64)[:, None]
        query = query_ptr + token * query_stride + heads * query_head_stride
        out = out_ptr + (token * QUERY_HEADS + heads) * D
        kept = heads < QUERY_HEADS
        _turn_heads(query, out, kept, cos, sin, q_norm_ptr, eps, D, ROTARY, HALF_BLOCK, REST_BLOCK)
    else:
        heads = ((group - QUERY_GROUPS) * HEADS + tl.arange(0, HEADS)).to(tl.int64)[:, None]
        slot = tl.load(slot_ptr + token)
        kept = heads < tl.where(slot >= 0, KV_HEADS, 0)
        key = key_ptr + token * key_stride + heads * key_head_stride
        target = _slot_heads(
            key_cache_ptr, slot, heads, key_block_stride, key_cache_head_stride, key_row_stride, BLOCK_SIZE
        )
        _turn_heads(key, target, kept, cos, sin, k_norm_ptr, eps, D, ROTARY, HALF_BLOCK, REST_BLOCK)
        value = value_ptr + token * value_stride + heads * value_head_stride
        target = _slot_heads(
            value_cache_ptr,
            slot,
            heads,
            value_block_stride,
            value_cache_head_stride,
            value_row_stride,
            BLOCK_SIZE,
        )
        _copy_heads(value, target, kept, D, BLOCK_D)


def _heads_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def store_kv(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
) -> None:
    """Write ``key`` [T, Hkv, D] and ``value`` [T, Hkv, Dv] into caches [num_blocks, Hkv, block_size, D or Dv].

    Values are rounded to the dtype of the caches. Tokens, heads and cache rows may be strided.
    ``slot_mapping`` is int64 [T].
    """
    key, value = _heads_contiguous(key), _heads_contiguous(value)
    tokens, kv_heads, key_size = key.shape
    key_block, value_block = (triton.next_power_of_2(x.shape[-1]) for x in (key, value))
    heads = max(1, ELEMENTS // max(key_block, value_block))
    launch(
        _store_kv_kernel,
        (tokens * triton.cdiv(kv_heads, heads),),
        key,
        value,
        key_cache,
        value_cache,
        slot_mapping,
        *key.stride()[:2],
        *value.stride()[:2],
        *key_cache.stride()[:3],
        *value_cache.stride()[:3],
        KV_HEADS=kv_heads,
        KEY_D=key_size,
        VALUE_D=value.shape[-1],
        BLOCK_SIZE=key_cache.shape[2],
        HEADS=heads,
        KEY_BLOCK=key_block,
        VALUE_BLOCK=value_block,
    )


def rope_and_store(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Rotate ``query`` [T, Hq, D] -> contiguous [T, Hq, D], and `store_kv` the rotated ``key`` and ``value``.

    ``x = (x1, x2, rest)`` of R/2, R/2 and D - R elements becomes
    ``(x1 cos - x2 sin, x2 cos + x1 sin, rest)``. ``cos`` and ``sin`` are float32 [T, R] with equal halves:
    only the first is read. ``q_norm`` and ``k_norm`` [D] are weights of a root mean square norm of each head
    before the rotation, rounded to the dtype of its input. ``key`` and ``value`` are [T, Hkv, D]. Tokens and
    heads may be strided (views of one packed row). Computed in float32.
    """
    query, key, value = _heads_contiguous(query), _heads_contiguous(key), _heads_contiguous(value)
    tokens, query_heads, size = query.shape
    kv_heads, rotary = key.shape[1], cos.shape[-1]
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    block = triton.next_power_of_2(size)
    heads = max(1, ELEMENTS // block)
    launch(
        _rope_and_store_kernel,
        (tokens * (triton.cdiv(query_heads, heads) + triton.cdiv(kv_heads, heads)),),
        query,
        key,
        value,
        cos,
        sin,
        out,
        key_cache,
        value_cache,
        slot_mapping,
        q_norm,
        k_norm,
        eps,
        *query.stride()[:2],
        *key.stride()[:2],
        *value.stride()[:2],
        cos.stride(0),
        sin.stride(0),
        *key_cache.stride()[:3],
        *value_cache.stride()[:3],
        QUERY_HEADS=query_heads,
        KV_HEADS=kv_heads,
        D=size,
        ROTARY=rotary,
        BLOCK_SIZE=key_cache.shape[2],
        HEADS=heads,
        HALF_BLOCK=triton.next_power_of_2(rotary // 2),
        REST_BLOCK=triton.next_power_of_2(max(1, size - rotary)),
        BLOCK_D=block,
        num_warps=2,
    )
    return out
