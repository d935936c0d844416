"""Linear layers packed for the native kernels."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from logitkernels.cpu.arguments import as_float32, as_integers, num_threads
from logitkernels.cpu.library import Library, LinearPartStruct, LinearStruct
from logitkernels.cpu.memory import PackedMemory
from logitkernels.int4 import GROUP_SIZES, group_bytes, int4_format
from logitkernels.weights import BlockWeight, Linear, Weight, stack_dense

PANEL_COLUMNS = 32


class LinearKind(IntEnum):
    """Storage format and multiplication of dense weights; ``LinearKind`` of linear.h."""

    BF16_DOT = 0
    BF16_FMA = 1
    F32_FMA = 2
    F16_FMA = 3
    BF16_TILES = 4


ROUNDS_ROWS = frozenset({LinearKind.BF16_DOT, LinearKind.BF16_TILES})
"""Kinds that read rows rounded to bfloat16, which no other kind reads."""


class Bf16Sums(IntEnum):
    """Order in which this processor sums products of bfloat16; ``Bf16Sums`` of linear.cpp."""

    ONE_BY_ONE = 0
    IN_PAIRS = 1
    IN_TILES = 2


FIRST_BLOCKS = 16
"""The kind of blocks of type t is this plus 2 t, and one more for float32 activations."""


class GgufType(IntEnum):
    """Block formats that are multiplied in the form in which GGUF files store them, by their numbers in the file."""

    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    IQ4_NL = 20
    IQ4_XS = 23
    MXFP4 = 39


class Int4Type(IntEnum):
    """Block formats of our own, in groups of so many weights; see int4.py."""

    INT4_32 = 64
    INT4_64 = 65
    INT4_128 = 66


BLOCK_TYPES: dict[str, GgufType | Int4Type] = {**GgufType.__members__, **Int4Type.__members__}
"""Block formats that are multiplied as they are stored, by name."""

STORED: dict[GgufType | Int4Type, tuple[int, int]] = {
    GgufType.Q4_0: (32, 18),
    GgufType.Q4_1: (32, 20),
    GgufType.Q5_0: (32, 22),
    GgufType.Q5_1: (32, 24),
    GgufType.Q8_0: (32, 34),
    GgufType.Q2_K: (256, 84),
    GgufType.Q3_K: (256, 110),
    GgufType.Q4_K: (256, 144),
    GgufType.Q5_K: (256, 176),
    GgufType.Q6_K: (256, 210),
    GgufType.IQ4_NL: (32, 18),
    GgufType.IQ4_XS: (256, 136),
    GgufType.MXFP4: (32, 17),
    **{Int4Type[int4_format(size)]: (size, group_bytes(size)) for size in GROUP_SIZES},
}
"""Weights of a block, and its bytes in the file. What a packed panel takes is in quantized.h."""


@dataclass(frozen=True, slots=True)
class _Part:
    """Packed rows of a weight: ``LinearPart`` of linear.h."""

    kind: int
    rows: int
    packed: Tensor


class CpuLinear(Linear):
    """Linear layer in the layout that linear.h describes. Activations are rounded as the kind of each part says."""

    def __init__(
        self,
        library: Library,
        memory: PackedMemory,
        weights: Sequence[Weight],
        bias: Tensor | None,
        *,
        exact: bool,
    ) -> None:
        """Pack the weights: dense ones, and blocks in the formats of `BLOCK_TYPES`.

        A bf16 weight is multiplied by activations rounded to bf16 or, with ``exact`` or beside blocks, by float32
        ones. A float32 or float16 weight is always multiplied by float32 activations. When bf16 represents all of
        it exactly, it is stored as bf16: half the bytes, the same bits in the result. Blocks are kept without
        loss; their weights are ``d q + m``, unrounded. Activations that multiply blocks are rounded as quantized.h
        says unless ``exact``.

        Raises:
            TypeError: a dense weight is neither bfloat16, float16 nor float32, or blocks are not uint8.
            ValueError: the shapes do not fit, or the format is not one of `BLOCK_TYPES`.
        """
        super().__init__(weights, bias)
        self._library = library
        if any(isinstance(weight, BlockWeight) for weight in weights):
            self._parts = [_pack(library, memory, weight, exact=exact) for weight in weights]
        else:
            self._parts = [_pack_dense(library, memory, stack_dense(weights), exact=exact)]
        if len(weights) == 1 and isinstance(weights[0], BlockWeight):
            self.block_format = weights[0].format
        kinds = {part.kind for part in self._parts}
        # No weights break this, as _pack rounds no rows; the products would read rows of another form.
        assert len(kinds) == 1 or not kinds & ROUNDS_ROWS, f"kinds {sorted(kinds)} read different rows"  # noqa: S101
        self._bias = None if bias is None else bias.detach().to(torch.float32, copy=True).contiguous()
        structs = [LinearPartStruct(part.kind, part.rows, part.packed.data_ptr()) for part in self._parts]
        self.struct = LinearStruct(
            self.out_features,
            self.in_features,
            None if self._bias is None else self._bias.data_ptr(),
            len(structs),
            (LinearPartStruct * len(structs))(*structs),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of weights that a product reads."""
        return sum(part.packed.nbytes for part in self._parts)

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the layer: [..., K] -> [..., N]."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x is {list(x.shape)}; the layer reads {self.in_features} features")
        rows = as_float32(x, "x").reshape(-1, self.in_features)
        out = torch.empty(rows.shape[0], self.out_features)
        if len(rows):
            self._library.linear(
                byref(self.struct), rows.data_ptr(), rows.shape[0], out.data_ptr(), num_threads()
            )
        return out.to(x.dtype).view(*x.shape[:-1], self.out_features)


def _pack(library: Library, memory: PackedMemory, weight: Weight, *, exact: bool) -> _Part:
    """Pack a weight of a layer that has blocks."""
    if isinstance(weight, BlockWeight):
        return _pack_blocks(library, memory, weight, exact=exact)
    return _pack_dense(library, memory, weight.tensor.detach(), exact=True)


def _pack_dense(library: Library, memory: PackedMemory, weight: Tensor, *, exact: bool) -> _Part:
    if weight.dtype == torch.float32:
        narrow = weight.to(torch.bfloat16)
        fits = torch.equal(narrow.float(), weight)
        kind = LinearKind.BF16_FMA if fits else LinearKind.F32_FMA
        weight = narrow if fits else weight
    elif weight.dtype == torch.float16:
        kind = LinearKind.F16_FMA
    elif weight.dtype == torch.bfloat16:
        tiles = library.bf16_sums() == Bf16Sums.IN_TILES
        rounded = LinearKind.BF16_TILES if tiles else LinearKind.BF16_DOT
        kind = LinearKind.BF16_FMA if exact else rounded
    else:
        raise TypeError(f"weight is {weight.dtype}; the native kernels pack bfloat16, float16 and float32")
    rows, depth = weight.shape
    weight = weight.contiguous()
    pack_panels = {
        LinearKind.F32_FMA: library.pack_f32,
        LinearKind.F16_FMA: library.pack_f16,
    }.get(kind, library.pack_bf16)
    steps = depth + depth % 2 if weight.dtype == torch.bfloat16 else depth
    packed = memory.allocate(-(-rows // PANEL_COLUMNS) * steps * PANEL_COLUMNS * weight.itemsize)
    pack_panels(weight.data_ptr(), depth, rows, depth, packed.data_ptr(), num_threads())
    return _Part(kind, rows, packed)


def check_raw(weight: BlockWeight, block: int, block_bytes: int) -> None:
    """Check the bytes of a weight whose blocks of ``block`` weights take ``block_bytes``.

    Raises:
        TypeError: they are not uint8.
        ValueError: there are not as many as the shape needs.
    """
    (rows, depth), raw = weight.shape, weight.raw
    if raw.dtype != torch.uint8:
        raise TypeError(f"raw is {raw.dtype}; blocks are torch.uint8")
    if depth % block:
        raise ValueError(f"shape is {weight.shape}; K must be a multiple of {block}")
    expected = rows * depth // block * block_bytes
    if raw.numel() != expected:
        raise ValueError(f"raw has {raw.numel()} bytes; {weight.shape} in {weight.format} has {expected}")


def _pack_blocks(library: Library, memory: PackedMemory, weight: BlockWeight, *, exact: bool) -> _Part:
    if weight.format not in BLOCK_TYPES:
        raise ValueError(f"{weight.format} is not among {', '.join(sorted(BLOCK_TYPES))}")
    (rows, depth), block_type = weight.shape, BLOCK_TYPES[weight.format]
    check_raw(weight, *STORED[block_type])
    order = None if weight.order is None else as_integers(weight.order, torch.int64, "order")
    if order is not None and not torch.equal(order.sort().values, torch.arange(rows)):
        raise ValueError(f"order does not hold each of the {rows} rows once")
    raw = weight.raw.contiguous()
    packed = memory.allocate(library.packed_bytes(block_type, rows, depth))
    library.pack_blocks(
        raw.data_ptr(),
        None if order is None else order.data_ptr(),
        block_type,
        rows,
        depth,
        packed.data_ptr(),
        num_threads(),
    )
    return _Part(FIRST_BLOCKS + 2 * block_type + exact, rows, packed)
