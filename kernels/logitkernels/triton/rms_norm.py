"""Root mean square norms of rows, optionally of the sum with the residual stream.

Each row is read once and kept in registers. Bytes moved per element: one read of ``x`` and one write; the sum
adds one read and one write of the residual.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from logitkernels.triton.launch import launch

ELEMENTS = 2048
"""Elements of the short rows that share a program; a longer row has a program to itself."""


@triton.jit
def _normalize(x: tl.tensor, weight: tl.tensor, eps: tl.tensor, n: tl.tensor) -> tl.tensor:
    """Norm rows [ROWS, BLOCK] of float32 whose elements past n are zero."""
    mean_square = tl.sum(x * x, axis=1) / n
    return x * tl.rsqrt(mean_square + eps)[:, None] * weight[None, :]


# num_rows is not specialized on: it must not choose among compilations that add in another order.
@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_rows: tl.tensor,
    heads: tl.tensor,
    n: tl.tensor,
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    eps: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    mask = (rows < num_rows)[:, None] & (columns < n)[None, :]
    start = rows // heads * token_stride + rows % heads * head_stride
    x = tl.load(x_ptr + start[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=columns < n, other=0.0).to(tl.float32)
    normed = _normalize(x, weight, eps, n)
    tl.store(out_ptr + rows[:, None] * n + columns[None, :], normed.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _add_rms_norm_kernel(
    residual_ptr: tl.tensor,
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    sum_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_rows: tl.tensor,
    n: tl.tensor,
    residual_stride: tl.tensor,
    x_stride: tl.tensor,
    eps: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    dtype: tl.constexpr = residual_ptr.dtype.element_ty
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    mask = (rows < num_rows)[:, None] & (columns < n)[None, :]
    residual = tl.load(
        residual_ptr + rows[:, None] * residual_stride + columns[None, :], mask=mask, other=0.0
    )
    x = tl.load(x_ptr + rows[:, None] * x_stride + columns[None, :], mask=mask, other=0.0)
    weight = tl.load(weight_ptr + columns, mask=columns < n, other=0.0).to(tl.float32)
    # The norm applies to the sum as rounded for storage.
    total = (residual.to(tl.float32) + x.to(dtype).to(tl.float32)).to(dtype)
    out = rows[:, None] * n + columns[None, :]
    tl.store(sum_ptr + out, total, mask=mask)
    normed = _normalize(total.to(tl.float32), weight, eps, n)
    tl.store(out_ptr + out, normed.to(out_ptr.dtype.element_ty), mask=mask)


def _tile(n: int) -> dict[str, int]:
    """Return rows per program, columns and warps for rows of n elements, independent of the number of rows."""
    block = triton.next_power_of_2(n)
    return {
        "ROWS": max(1, ELEMENTS // block),
        "BLOCK": block,
        "num_warps": min(16, max(4, block // 512)),
    }


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Return ``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension of ``x`` [T, n] or [T, heads, n],
    in ``dtype``.

    Computed in float32; follows Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019). ``weight`` is [n].
    Tokens and heads of ``x`` may be strided. Reads ``x`` and writes as many elements, in one launch.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    tokens, heads, n = x.shape if x.dim() == 3 else (x.shape[0], 1, x.shape[1])
    head_stride = x.stride(1) if x.dim() == 3 else 0
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    tile = _tile(n)
    rows = tokens * heads
    launch(
        _rms_norm_kernel,
        (triton.cdiv(rows, tile["ROWS"]),),
        x,
        weight,
        out,
        rows,
        heads,
        n,
        x.stride(0),
        head_stride,
        eps,
        **tile,
    )
    return out


def add_rms_norm(
    residual: Tensor, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return ``sum = residual + x`` [T, H] in the dtype of ``residual``, and ``rms_norm(sum)`` in ``dtype``.

    ``weight`` is [H]. Rows may be strided. Reads both and writes both, in one launch.
    """
    residual = residual if residual.stride(-1) == 1 else residual.contiguous()
    x = x if x.stride(-1) == 1 else x.contiguous()
    rows, n = residual.shape
    total = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
    out = torch.empty(residual.shape, dtype=dtype, device=residual.device)
    tile = _tile(n)
    launch(
        _add_rms_norm_kernel,
        (triton.cdiv(rows, tile["ROWS"]),),
        residual,
        x,
        weight,
        total,
        out,
        rows,
        n,
        residual.stride(0),
        x.stride(0),
        eps,
        **tile,
    )
    return total, out
