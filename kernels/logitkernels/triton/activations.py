"""Gated activations ``activation(gate) * up`` of rows that hold gate and up one after the other.

Computed in float32, rounded once. Bytes moved per output element: two reads and one write.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from logitkernels.triton.launch import launch

BLOCK = 1024
"""Output elements of one program: 16 bytes per thread and load for 16-bit numbers in four warps."""

SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)


SATURATED = tl.constexpr(16.0)
"""Magnitude from which the gate of gelu is exactly 0 or 1 in float32."""


@triton.jit
def _sigmoid(x: tl.tensor) -> tl.tensor:
    # The argument is never positive, so that exp cannot overflow.
    power = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, power) / (1.0 + power)


@triton.jit
def _silu(x: tl.tensor) -> tl.tensor:
    return x * _sigmoid(x)


@triton.jit
def _gelu_tanh(x: tl.tensor) -> tl.tensor:
    # (1 + tanh(u)) / 2 is sigmoid(2 u). The bound keeps the cube finite.
    bounded = tl.minimum(tl.maximum(x, -SATURATED), SATURATED)
    inner = SQRT_2_OVER_PI * (bounded + 0.044715 * bounded * bounded * bounded)
    return x * _sigmoid(2.0 * inner)


@triton.jit
def _activate_and_mul_kernel(
    gate_up_ptr: tl.tensor,
    out_ptr: tl.tensor,
    size: tl.tensor,
    row_stride: tl.tensor,
    GELU: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    blocks = tl.cdiv(size, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = columns < size
    gate_ptr = gate_up_ptr + row * row_stride
    gate = tl.load(gate_ptr + columns, mask=mask).to(tl.float32)
    up = tl.load(gate_ptr + size + columns, mask=mask).to(tl.float32)
    activated = _gelu_tanh(gate) if GELU else _silu(gate)
    tl.store(out_ptr + row * size + columns, (activated * up).to(out_ptr.dtype.element_ty), mask=mask)


def _activate_and_mul(gate_up: Tensor, *, gelu: bool) -> Tensor:
    gate_up = gate_up if gate_up.stride(-1) == 1 else gate_up.contiguous()
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, size, dtype=gate_up.dtype, device=gate_up.device)
    block = min(BLOCK, triton.next_power_of_2(size))
    launch(
        _activate_and_mul_kernel,
        (rows * triton.cdiv(size, block),),
        gate_up,
        out,
        size,
        gate_up.stride(0),
        GELU=gelu,
        BLOCK=block,
    )
    return out


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """Return ``gate / (1 + exp(-gate)) * up`` of [T, 2 I] -> [T, I], same dtype; gate is the first half of each row."""
    return _activate_and_mul(gate_up, gelu=False)


def gelu_and_mul(gate_up: Tensor) -> Tensor:
    """Return ``gelu(gate) * up`` of [T, 2 I] -> [T, I] by the tanh approximation of Hendrycks and Gimpel (2016).

    ``gelu(x) = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))``.
    """
    return _activate_and_mul(gate_up, gelu=True)
