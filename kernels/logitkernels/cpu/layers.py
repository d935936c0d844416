"""Decoder layers of the Llama and Gemma families in one call of the compiled library."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref, pointer
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from logitkernels.attention import AttentionMetadata
from logitkernels.cpu.arguments import (
    BatchArguments,
    as_float32,
    cache_struct,
    check_rotary,
    key_cache_struct,
    num_threads,
    window_of,
)
from logitkernels.cpu.library import GATES, CacheStruct, DecoderLayerStruct, Library
from logitkernels.cpu.linear import CpuLinear
from logitkernels.decoder import DecoderLayerWeights


class CpuLayers:
    """Layers with their caches in the form that the library reads, and the tensors that they point to."""

    def __init__(
        self,
        library: Library,
        layers: Sequence[DecoderLayerWeights],
        key_caches: Sequence[Tensor],
        value_caches: Sequence[Tensor],
    ) -> None:
        count = len(layers)
        if not count == len(key_caches) == len(value_caches):
            raise ValueError(
                f"{count} layers with {len(key_caches)} key and {len(value_caches)} value caches"
            )
        self._library = library
        layers = [_with_float32_vectors(layer) for layer in layers]
        self._tensors = (layers, key_caches, value_caches)
        self._head_size = layers[0].head_dim
        self._layers = (DecoderLayerStruct * count)(*map(_struct_of, layers))
        self._keys = (CacheStruct * count)(*map(key_cache_struct, key_caches))
        self._values = (CacheStruct * count)(*map(cache_struct, value_caches))

    def __call__(self, hidden: Tensor, cos: Tensor, sin: Tensor, metadata: AttentionMetadata) -> Tensor:
        tokens = hidden.shape[0]
        rotary = check_rotary(cos, sin, tokens, self._head_size)
        cos, sin = as_float32(cos, "cos"), as_float32(sin, "sin")
        out = hidden.to(torch.float32, copy=True).contiguous()
        batch = BatchArguments(metadata)
        self._library.decoder_layers(
            self._layers,
            len(self._layers),
            out.data_ptr(),
            tokens,
            cos.data_ptr(),
            sin.data_ptr(),
            rotary,
            self._keys,
            self._values,
            byref(batch.struct),
            num_threads(),
        )
        return out.to(hidden.dtype)


VECTORS = (
    "input_norm",
    "post_attention_norm",
    "q_norm",
    "k_norm",
    "attention_output_norm",
    "mlp_output_norm",
)
"""Weights of a layer that are no linear layer's."""


def _with_float32_vectors(layer: DecoderLayerWeights) -> DecoderLayerWeights:
    if (layer.q_norm is None) != (layer.k_norm is None):
        raise ValueError("a layer has both q_norm and k_norm or neither")
    vectors: dict[str, Any] = {name: _float32(getattr(layer, name), name) for name in VECTORS}
    sinks = _float32(layer.attention.sinks, "sinks")
    return replace(layer, **vectors, attention=replace(layer.attention, sinks=sinks))


def _float32(vector: Tensor | None, name: str) -> Tensor | None:
    return None if vector is None else as_float32(vector.detach(), name)


def _struct_of(layer: DecoderLayerWeights) -> DecoderLayerStruct:
    """Return the library's struct for a layer with float32 vectors. It points to the layer's own tensors."""
    struct = DecoderLayerStruct()
    for name in ("qkv", "output", "gate_up", "down"):
        linear = getattr(layer, name)
        if not isinstance(linear, CpuLinear):
            raise TypeError(f"{name} is a {type(linear).__name__}; it must be packed by the native kernels")
        setattr(struct, name, pointer(linear.struct))
    for name in VECTORS:
        setattr(struct, name, _address(getattr(layer, name)))
    struct.sinks = _address(layer.attention.sinks)
    struct.heads, struct.kv_heads, struct.head_size = layer.num_heads, layer.num_kv_heads, layer.head_dim
    struct.sliding_window = window_of(layer.attention.sliding_window)
    struct.gate = GATES[layer.activation]
    struct.eps, struct.scale, struct.softcap = (
        layer.eps,
        layer.attention.scale,
        layer.attention.softcap or 0.0,
    )
    return struct


def _address(vector: Tensor | None) -> int | None:
    return None if vector is None else vector.data_ptr()
