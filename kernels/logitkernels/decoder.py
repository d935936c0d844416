"""Decoder layers of the Llama and Gemma families: their weights, and their composition from a backend's operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from logitkernels.attention import AttentionMetadata, AttentionOptions
from logitkernels.weights import Linear

if TYPE_CHECKING:
    from logitkernels.interface import Kernels

Activation = Literal["silu", "gelu_tanh"]
"""Activation of a gated MLP: silu, or the tanh approximation of gelu."""


@dataclass(frozen=True, slots=True)
class DecoderLayerWeights:
    """Weights of one decoder layer of the Llama or Gemma family, packed by the backend that will run it.

    ``qkv`` is [ (Hq + 2 Hkv) D, H ] in the order q, k, v; ``gate_up`` is [2 I, H] in the order gate, up.
    ``q_norm`` and ``k_norm`` are [D] (per-head norms of Qwen3 and Gemma 3) or None. ``attention_output_norm``
    and ``mlp_output_norm`` are [H] (Gemma 2 and 3) or None; they norm the output of attention and of the MLP
    before it is added to the residual stream. Norm weights multiply the normed values directly (Gemma's
    ``1 + w`` already added).
    """

    input_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    output: Linear
    post_attention_norm: Tensor
    gate_up: Linear
    down: Linear
    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float
    attention: AttentionOptions
    activation: Activation = "silu"
    attention_output_norm: Tensor | None = None
    mlp_output_norm: Tensor | None = None


BoundLayers = Callable[[Tensor, Tensor, Tensor, AttentionMetadata], Tensor]
"""Function of ``hidden``, ``cos``, ``sin`` and a batch's metadata that returns hidden states; see ``bind_layers``."""


class ComposedLayers:
    """Layers with their caches, computed one operation after the other. A `BoundLayers`.

    A layer's update is added to the residual stream by the next norm, which reads both anyway.
    """

    def __init__(
        self,
        kernels: Kernels,
        layers: Sequence[DecoderLayerWeights],
        key_caches: Sequence[Tensor],
        value_caches: Sequence[Tensor],
    ) -> None:
        self._kernels = kernels
        self._layers = list(zip(layers, key_caches, value_caches, strict=True))

    def __call__(self, hidden: Tensor, cos: Tensor, sin: Tensor, metadata: AttentionMetadata) -> Tensor:
        kernels = self._kernels
        update: Tensor | None = None
        for layer, key_cache, value_cache in self._layers:
            hidden, normed = self._add_and_norm(hidden, update, layer.input_norm, layer)
            query, key, value = _heads(layer.qkv(normed), layer)
            query = kernels.rope_and_store(
                query,
                key,
                value,
                cos,
                sin,
                key_cache,
                value_cache,
                metadata.slot_mapping,
                q_norm=layer.q_norm,
                k_norm=layer.k_norm,
                eps=layer.eps,
            )
            attended = kernels.paged_attention(query, key_cache, value_cache, metadata, layer.attention)
            update = self._normed(layer.output(attended.flatten(1)), layer.attention_output_norm, layer)
            hidden, normed = self._add_and_norm(hidden, update, layer.post_attention_norm, layer)
            gate_up = layer.gate_up(normed)
            is_silu = layer.activation == "silu"
            gated = kernels.silu_and_mul(gate_up) if is_silu else kernels.gelu_and_mul(gate_up)
            update = self._normed(layer.down(gated), layer.mlp_output_norm, layer)
        return hidden if update is None else hidden + update

    def _add_and_norm(
        self, hidden: Tensor, update: Tensor | None, weight: Tensor, layer: DecoderLayerWeights
    ) -> tuple[Tensor, Tensor]:
        # The dtype of the operations between the norms and the residual stream.
        dtype = layer.qkv.input_dtype or hidden.dtype
        if update is None:
            return hidden, self._kernels.rms_norm(hidden, weight, layer.eps).to(dtype)
        return self._kernels.add_rms_norm(hidden, update, weight, layer.eps, dtype)

    def _normed(self, update: Tensor, weight: Tensor | None, layer: DecoderLayerWeights) -> Tensor:
        return update if weight is None else self._kernels.rms_norm(update, weight, layer.eps)


def _heads(qkv: Tensor, layer: DecoderLayerWeights) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value heads [T, heads, D] as views of the packed rows [T, (Hq + 2 Hkv) D]."""
    heads = qkv.view(qkv.shape[0], -1, layer.head_dim)
    query, key, value = heads.split([layer.num_heads, layer.num_kv_heads, layer.num_kv_heads], dim=1)
    return query, key, value
