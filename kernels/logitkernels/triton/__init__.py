"""The Triton backend: GPU kernels behind the same functions as the other backends.

Without a GPU they run on CPU tensors in Triton's interpreter (TRITON_INTERPRET=1), for tests.
"""

from logitkernels.triton.kernels import TritonKernels

__all__ = ["TritonKernels"]
