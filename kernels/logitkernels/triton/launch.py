"""Launch of a Triton kernel."""

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
    """Run ``kernel[grid](*args, **constants)``; an empty grid launches nothing.

    The compiler never fuses multiplies and adds. A helper therefore computes the same bits in every kernel
    that shares it, in Triton's interpreter and on every architecture.
    """
    if all(grid):
        kernel[grid](*args, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=False, **constants)
