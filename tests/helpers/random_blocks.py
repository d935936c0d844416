"""Random blocks in the formats of GGUF files, which gguf's own code dequantises, and in our own int4 formats."""

from __future__ import annotations

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray
from torch import Tensor

FLOAT16_AT = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}
"""Offsets of the float16 scales in a block. MXFP4 has an exponent instead."""


def random_blocks(
    name: str, rows: int, depth: int, *, seed: int = 0, exponents: tuple[int, int] = (110, 130)
) -> tuple[Tensor, Tensor]:
    """Return blocks, uint8 [rows, bytes of a row], and their weights [rows, depth] in float64.

    All bytes are random but the scales, which are finite, of either sign, and also zero or denormal.
    ``exponents`` bounds those of MXFP4.
    """
    generator = np.random.default_rng(rows * 1000 + depth + seed)
    if name.startswith("INT4"):
        return _random_int4(name, rows, depth, generator)
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    raw = generator.integers(0, 256, (rows, depth // block, size), dtype=np.uint8)
    if name == "MXFP4":
        raw[:, :, 0] = generator.integers(*exponents, raw.shape[:2])
    for offset in FLOAT16_AT.get(name, ()):
        scales = generator.normal(0, 0.05, (*raw.shape[:2], 1)).astype(np.float16)
        scales[generator.random(scales.shape) < 0.02] = 0
        scales[generator.random(scales.shape) < 0.02] = 3e-6
        raw[:, :, offset : offset + 2] = scales.view(np.uint8)
    flat = raw.reshape(rows, -1)
    return torch.from_numpy(flat), dequantized(name, torch.from_numpy(flat))


def dequantized(name: str, raw: Tensor) -> Tensor:
    """Return the weights of blocks [rows, bytes of a row] in float64. Those of GGUF files are rounded to float32."""
    if not name.startswith("INT4"):
        return torch.from_numpy(dequantize(raw.numpy(), GGMLQuantizationType[name]).astype(np.float64))
    size = int(name.removeprefix("INT4_"))
    groups = raw.numpy().reshape(len(raw), -1, 5 + size // 2)
    scales = np.ascontiguousarray(groups[:, :, :4]).view("<f4").astype(np.float64)
    integers = np.empty((*groups.shape[:2], size))
    for k in range(size):
        byte = groups[:, :, 5 + k // 2]
        integers[:, :, k] = byte >> 4 if k % 2 else byte & 15
    weights = scales * (integers - groups[:, :, 4:5])
    return torch.from_numpy(weights.reshape(len(raw), -1))


def _random_int4(name: str, rows: int, depth: int, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Scales have all bits of float32."""
    size = int(name.removeprefix("INT4_"))
    groups: NDArray[np.uint8] = generator.integers(
        0, 256, (rows, depth // size, 5 + size // 2), dtype=np.uint8
    )
    scales = generator.normal(0, 0.05, (*groups.shape[:2], 1)).astype("<f4")
    scales[generator.random(scales.shape) < 0.02] = 0
    groups[:, :, :4] = scales.view(np.uint8)
    groups[:, :, 4] &= 15
    raw = torch.from_numpy(groups.reshape(rows, -1))
    return raw, dequantized(name, raw)
