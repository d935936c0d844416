"""The native CPU backend: C++ compiled on first use, behind the same functions as the other backends."""

from logitkernels.cpu.kernels import CpuKernels

__all__ = ["CpuKernels"]
