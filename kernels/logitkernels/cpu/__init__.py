"""The native CPU backend: C++ compiled on first use, behind the same functions as the other backends."""

from logitkernels.cpu.kernels import CpuKernels
from logitkernels.cpu.linear import GgufType, Int4Type

__all__ = ["CpuKernels", "GgufType", "Int4Type"]
