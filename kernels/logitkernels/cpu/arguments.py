"""Arguments as the compiled library takes them."""

from __future__ import annotations

import torch
from torch import Tensor


def num_threads() -> int:
    return torch.get_num_threads()


def threads_for(rows: int) -> int:
    """Threads for work that gives each row to one of them. All or one: OpenMP ends those that a smaller team leaves out."""
    return num_threads() if rows > 1 else 1


def as_float32(tensor: Tensor, name: str) -> Tensor:
    """The tensor itself when it is contiguous float32, else a copy that is."""
    if tensor.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"{name} is {tensor.dtype}; the native kernels compute on float32 and bfloat16")
    return tensor.to(torch.float32).contiguous()


def as_integers(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """The tensor itself when it is contiguous, else a copy that is. Raises TypeError for another dtype."""
    if tensor.dtype != dtype:
        raise TypeError(f"{name} is {tensor.dtype}; it must be {dtype}")
    return tensor.contiguous()
