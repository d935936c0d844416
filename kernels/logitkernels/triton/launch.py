"""How every Triton kernel is launched."""

from __future__ import annotations

from typing import Any


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Any,
    num_warps: int = 4,
    num_stages: int = 2,
    **constants: Any,
) -> None:
    """``kernel[grid](*args, **constants)``; an empty grid launches nothing.

    Multiplies and adds are never fused by the compiler: what is written is what is computed, the same in every kernel
    that shares a helper, in Triton's interpreter and on every architecture.
    """
    if all(grid):
        kernel[grid](*args, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=False, **constants)
