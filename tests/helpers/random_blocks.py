"""Random blocks in the formats of GGUF files. gguf's own code dequantises them; it cannot quantise all formats."""

from __future__ import annotations

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
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
    weights = dequantize(flat, GGMLQuantizationType[name])
    return torch.from_numpy(flat), torch.from_numpy(weights.astype(np.float64))
