"""Linear layers packed for the native kernels."""

from __future__ import annotations

from ctypes import byref
from dataclasses import dataclass, field
from enum import IntEnum

import torch
from torch import Tensor

from logitkernels.cpu.library import Library, LinearStruct

PANEL_COLUMNS = 32


class LinearKind(IntEnum):
    """How weights are stored and multiplied; ``LinearKind`` of linear.h."""

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
    """Block formats of GGUF files that are multiplied as stored, by their numbers in the file."""

    Q4_0 = 2
    Q4_1 = 3
    Q8_0 = 8


BLOCK = 32
STORED_BYTES = {GgufType.Q4_0: 18, GgufType.Q4_1: 20, GgufType.Q8_0: 34}
"""Bytes of a block of 32 weights in the file; a packed panel takes as many."""


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A linear layer in the layout that linear.h describes.

    ``weights`` and ``bias`` are what ``struct`` points to.
    """

    kind: LinearKind
    out_features: int
    in_features: int
    weights: Tensor
    bias: Tensor | None
    struct: LinearStruct = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        struct = LinearStruct(
            self.kind,
            self.out_features,
            self.in_features,
            self.weights.data_ptr(),
            None if self.bias is None else self.bias.data_ptr(),
        )
        object.__setattr__(self, "struct", struct)

    @property
    def nbytes(self) -> int:
        """Bytes of weights that a product reads."""
        return self.weights.nbytes


def pack(library: Library, weight: Tensor, bias: Tensor | None, *, exact: bool) -> PackedLinear:
    """``weight`` [N, K] and ``bias`` [N] or None, packed.

    A bf16 weight is multiplied by activations rounded to bf16, or, if ``exact``, by float32 ones. A float32 weight is
    always multiplied by float32 activations; when bf16 represents all of it, it is stored so: half the bytes, the same
    bits in the result.

    Raises:
        TypeError: the weight is neither bfloat16 nor float32.
        ValueError: the shapes do not fit.
    """
    check_shapes(weight, bias)
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
    pack_panels(weight.data_ptr(), depth, rows, depth, packed.data_ptr(), torch.get_num_threads())
    return PackedLinear(kind, rows, depth, packed, pack_bias(bias))


def pack_gguf(
    library: Library,
    raw: Tensor,
    shape: tuple[int, int],
    gguf_type: GgufType,
    bias: Tensor | None,
    *,
    exact: bool,
) -> PackedLinear:
    """The blocks of a GGUF file, repacked without loss.

    Args:
        library: the compiled kernels.
        raw: uint8, the tensor's bytes: its rows [N, K / 32 * block bytes], flat or not.
        shape: (N, K) of the weight; K is a multiple of 32.
        gguf_type: the block format.
        bias: [N] or None.
        exact: multiply by float32 activations instead of activations rounded as quantized.h says.

    Raises:
        TypeError: raw is not uint8.
        ValueError: the shapes do not fit.
    """
    rows, depth = shape
    if raw.dtype != torch.uint8:
        raise TypeError(f"raw is {raw.dtype}; the blocks of a GGUF file are torch.uint8")
    if rows < 1 or depth < 1 or depth % BLOCK:
        raise ValueError(f"shape is {shape}; K must be a multiple of {BLOCK} and both above zero")
    expected = rows * depth // BLOCK * STORED_BYTES[gguf_type]
    if raw.numel() != expected:
        raise ValueError(f"raw has {raw.numel()} bytes; {shape} in {gguf_type.name} has {expected}")
    if bias is not None and bias.shape != (rows,):
        raise ValueError(f"bias is {list(bias.shape)}; a weight of {list(shape)} needs [{rows}]")
    dot, fma = (LinearKind[f"{gguf_type.name}_{how}"] for how in ("DOT", "FMA"))
    padded = -(-rows // PANEL_COLUMNS) * PANEL_COLUMNS
    packed = torch.zeros(padded * depth // BLOCK * STORED_BYTES[gguf_type], dtype=torch.uint8)
    raw = raw.contiguous()
    library.pack_gguf(raw.data_ptr(), dot, rows, depth, packed.data_ptr(), torch.get_num_threads())
    return PackedLinear(fma if exact else dot, rows, depth, packed, pack_bias(bias))


def check_shapes(weight: Tensor, bias: Tensor | None) -> None:
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"weight is {list(weight.shape)}; it must be [N, K] with both above zero")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias is {list(bias.shape)}; a weight of {list(weight.shape)} needs [{len(weight)}]"
        )


def pack_bias(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().to(torch.float32, copy=True).contiguous()


def multiply(library: Library, x: Tensor, packed: PackedLinear) -> Tensor:
    """float32 [T, K] -> float32 [T, N]."""
    out = torch.empty(x.shape[0], packed.out_features)
    library.linear(byref(packed.struct), x.data_ptr(), x.shape[0], out.data_ptr(), torch.get_num_threads())
    return out
