"""Conversion of arguments to the form that the compiled library takes."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from logitkernels.attention import AttentionMetadata
from logitkernels.cpu.library import BatchStruct, CacheStruct


def num_threads() -> int:
    return torch.get_num_threads()


def threads_for(rows: int) -> int:
    """Return the number of threads for work on rows of which each is one thread's, or too little to be worth a team.

    It is all threads or one, because OpenMP ends the threads that a smaller team leaves out.
    """
    return num_threads() if rows > 1 else 1


def as_float32(tensor: Tensor, name: str) -> Tensor:
    """Return the tensor itself when it is contiguous float32, else a copy that is."""
    if tensor.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"{name} is {tensor.dtype}; the native kernels compute on float32 and bfloat16")
    return tensor.to(torch.float32).contiguous()


def as_integers(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Return the tensor itself when it is contiguous, else a copy that is. Raises TypeError for another dtype."""
    if tensor.dtype != dtype:
        raise TypeError(f"{name} is {tensor.dtype}; it must be {dtype}")
    return tensor.contiguous()


class BatchArguments:
    """Attention metadata as the library reads it, with the tensors that it points to."""

    __slots__ = ("_tensors", "struct")

    def __init__(self, metadata: AttentionMetadata) -> None:
        starts = as_integers(metadata.query_start, torch.int32, "query_start")
        lengths = as_integers(metadata.seq_lens, torch.int32, "seq_lens")
        tables = as_integers(metadata.block_tables, torch.int32, "block_tables")
        slots = as_integers(metadata.slot_mapping, torch.int64, "slot_mapping")
        ends = None if metadata.key_ends is None else as_integers(metadata.key_ends, torch.int32, "key_ends")
        self._tensors = (starts, lengths, tables, slots, ends)
        self.struct = BatchStruct(
            len(lengths),
            starts.data_ptr(),
            lengths.data_ptr(),
            tables.data_ptr(),
            tables.shape[1],
            slots.data_ptr(),
            None if ends is None else ends.data_ptr(),
        )


def window_of(sliding_window: int | None) -> int:
    if sliding_window is None:
        return 0  # the library's value for no window
    if sliding_window < 1:
        raise ValueError(f"sliding_window is {sliding_window}; it must be at least 1")
    return sliding_window


def check_rotary(cos: Tensor, sin: Tensor, tokens: int, size: int) -> int:
    rotary = cos.shape[-1]
    if cos.shape != (tokens, rotary) or sin.shape != cos.shape or rotary % 2 or rotary > size:
        msg = (
            f"cos {list(cos.shape)} and sin {list(sin.shape)} do not fit {tokens} tokens of head size {size}"
        )
        raise ValueError(msg)
    return rotary


def cache_struct(cache: Tensor, *, may_be_transposed: bool = False) -> CacheStruct:
    if cache.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"the cache is {cache.dtype}; the native kernels read float32 and bfloat16")
    block_stride, head_stride, token_stride, element_stride = cache.stride()
    block_size = cache.shape[2]
    is_transposed = may_be_transposed and token_stride == 1 and block_size % 16 == 0
    if element_stride != 1 and not is_transposed:
        raise ValueError(
            "the last dimension of a cache must be contiguous; of keys, the third instead if it is a multiple of 16"
        )
    return CacheStruct(
        cache.data_ptr(),
        cache.dtype == torch.bfloat16,
        block_stride,
        head_stride,
        token_stride,
        element_stride,
        block_size,
    )


key_cache_struct = partial(cache_struct, may_be_transposed=True)
