"""Linear layers packed for the native kernels."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref
from enum import IntEnum

import torch
from torch import Tensor

from logitkernels.cpu.arguments import as_float32, num_threads
from logitkernels.cpu.library import Library, LinearStruct
from logitkernels.weights import BlockWeight, Linear, Weight, stack_blocks, stack_dense

PANEL_COLUMNS = 32


class LinearKind(IntEnum):
    """Storage format and multiplication of weights; ``LinearKind`` of linear.h."""

    BF16_DOT = 0
    BF16_FMA = 1
    F32_FMA = 2
    Q4_0_DOT = 3
    Q4_0_FMA = 4
    Q4_1_DOT = 5
    Q4_1_FMA = 6
    Q8_0_DOT = 7
    Q8_0_FMA = 8


class GgufType(IntEnum):
    """Block formats that are multiplied in the form in which GGUF files store them, by their numbers in the file."""

    Q4_0 = 2
    Q4_1 = 3
    Q8_0 = 8


BLOCK = 32
STORED_BYTES = {GgufType.Q4_0: 18, GgufType.Q4_1: 20, GgufType.Q8_0: 34}
"""Bytes of a block of 32 weights in the file; a block takes as many in a packed panel."""


class CpuLinear(Linear):
    """Linear layer in the layout that linear.h describes. Activations are rounded as ``kind`` says."""

    def __init__(
        self, library: Library, weights: Sequence[Weight], bias: Tensor | None, *, exact: bool
    ) -> None:
        """Pack the weights: dense ones, or blocks in one of the formats of `GgufType`.

        A bf16 weight is multiplied by activations rounded to bf16 or, with ``exact``, by float32 ones. A
        float32 weight is always multiplied by float32 activations. When bf16 represents all of it exactly, it
        is stored as bf16: half the bytes, the same bits in the result. Blocks are kept without loss; their
        weights are ``d q + m``, unrounded. Activations that multiply blocks are rounded as quantized.h says
        unless ``exact``.

        Raises:
            TypeError: a dense weight is neither bfloat16 nor float32, or blocks are not uint8.
            ValueError: the shapes do not fit, or the format is not one of `GgufType`.
        """
        super().__init__(weights, bias)
        self._library = library
        dense = stack_dense(weights)
        self.kind, self._weights = (
            _pack_blocks(library, stack_blocks(weights), exact=exact)
            if dense is None
            else _pack_dense(library, dense, exact=exact)
        )
        self._bias = None if bias is None else bias.detach().to(torch.float32, copy=True).contiguous()
        self.struct = LinearStruct(
            self.kind,
            self.out_features,
            self.in_features,
            self._weights.data_ptr(),
            None if self._bias is None else self._bias.data_ptr(),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of weights that a product reads."""
        return self._weights.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the layer: [..., K] -> [..., N]."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x is {list(x.shape)}; the layer reads {self.in_features} features")
        rows = as_float32(x, "x").reshape(-1, self.in_features)
        out = torch.empty(rows.shape[0], self.out_features)
        self._library.linear(
            byref(self.struct), rows.data_ptr(), rows.shape[0], out.data_ptr(), num_threads()
        )
        return out.to(x.dtype).view(*x.shape[:-1], self.out_features)


def _pack_dense(library: Library, weight: Tensor, *, exact: bool) -> tuple[LinearKind, Tensor]:
    if weight.dtype == torch.float32:
        narrow = weight.to(torch.bfloat16)
        fits = torch.equal(narrow.float(), weight)
        kind = LinearKind.BF16_FMA if fits else LinearKind.F32_FMA
        weight = narrow if fits else weight
    elif weight.dtype == torch.bfloat16:
        kind = LinearKind.BF16_FMA if exact else LinearKind.BF16_DOT
    else:
        raise TypeError(f"weight is {weight.dtype}; the native kernels pack bfloat16 and float32")
    rows, depth = weight.shape
    weight = weight.contiguous()
    steps, values = (depth, 1) if kind == LinearKind.F32_FMA else (-(-depth // 2), 2)
    packed = torch.empty(-(-rows // PANEL_COLUMNS) * steps * PANEL_COLUMNS * values, dtype=weight.dtype)
    pack_panels = library.pack_f32 if kind == LinearKind.F32_FMA else library.pack_bf16
    pack_panels(weight.data_ptr(), depth, rows, depth, packed.data_ptr(), num_threads())
    return kind, packed


def _pack_blocks(library: Library, weight: BlockWeight, *, exact: bool) -> tuple[LinearKind, Tensor]:
    if weight.format not in GgufType.__members__:
        raise ValueError(f"{weight.format} is not among {', '.join(sorted(GgufType.__members__))}")
    (rows, depth), raw, block_bytes = weight.shape, weight.raw, STORED_BYTES[GgufType[weight.format]]
    if raw.dtype != torch.uint8:
        raise TypeError(f"raw is {raw.dtype}; the blocks of a GGUF file are torch.uint8")
    if depth % BLOCK:
        raise ValueError(f"shape is {weight.shape}; K must be a multiple of {BLOCK}")
    expected = rows * depth // BLOCK * block_bytes
    if raw.numel() != expected:
        raise ValueError(f"raw has {raw.numel()} bytes; {weight.shape} in {weight.format} has {expected}")
    dot, fma = (LinearKind[f"{weight.format}_{how}"] for how in ("DOT", "FMA"))
    padded = -(-rows // PANEL_COLUMNS) * PANEL_COLUMNS
    packed = torch.zeros(padded * depth // BLOCK * block_bytes, dtype=torch.uint8)
    raw = raw.contiguous()
    library.pack_gguf(raw.data_ptr(), dot, rows, depth, packed.data_ptr(), num_threads())
    return (fma if exact else dot), packed
