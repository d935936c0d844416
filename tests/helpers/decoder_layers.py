"""A small random decoder layer of the Llama or Gemma family, packed by any backend."""

from __future__ import annotations

import torch
from logitkernels import AttentionOptions, DecoderLayerWeights, DenseWeight, Kernels, Linear
from torch import Tensor

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, SIZE = 96, 120, 6, 2, 32


def layer_of(
    kernels: Kernels,
    dtype: torch.dtype,
    *,
    qk_norm: bool = False,
    bias: bool = False,
    exact: bool = False,
    gemma: bool = False,
    sinks: Tensor | None = None,
) -> DecoderLayerWeights:
    """Return a random layer. With ``gemma`` it has the gelu, output norms, softcap and window of Gemma's families."""
    generator = torch.Generator().manual_seed(3)

    def packed(n: int, k: int) -> Linear:
        weight = (torch.randn(n, k, generator=generator) * k**-0.5).to(dtype)
        biases = torch.randn(n, generator=generator) if bias else None
        return kernels.pack([DenseWeight("w", weight)], biases, exact=exact)

    def norm(size: int) -> Tensor:
        return 1 + 0.1 * torch.randn(size, generator=generator)

    return DecoderLayerWeights(
        input_norm=norm(HIDDEN).to(dtype),
        qkv=packed((HEADS + 2 * KV_HEADS) * SIZE, HIDDEN),
        q_norm=norm(SIZE) if qk_norm else None,
        k_norm=norm(SIZE) if qk_norm else None,
        output=packed(HIDDEN, HEADS * SIZE),
        post_attention_norm=norm(HIDDEN),
        gate_up=packed(2 * INTERMEDIATE, HIDDEN),
        down=packed(HIDDEN, INTERMEDIATE),
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=SIZE,
        eps=1e-5,
        attention=AttentionOptions(
            SIZE**-0.5, sliding_window=19 if gemma else None, softcap=2.0 if gemma else None, sinks=sinks
        ),
        activation="gelu_tanh" if gemma else "silu",
        attention_output_norm=norm(HIDDEN).to(dtype) if gemma else None,
        mlp_output_norm=norm(HIDDEN) if gemma else None,
    )


def tables(positions: Tensor) -> tuple[Tensor, Tensor]:
    frequencies = 10000 ** (-torch.arange(0, SIZE, 2) / SIZE)
    angles = (positions[:, None] * frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()
