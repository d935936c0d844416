"""`fuse(model, kernels)`: swap well-known submodules for ones that call our kernels.

What is recognised is recognised by its class and its config, and checked: a variation that we do not know (a bias, a
norm of another kind) is left as transformers has it, only slower.
"""

from __future__ import annotations

from typing import Any

import torch
from logitkernels import AttentionMetadata, DecoderLayerWeights, Kernels
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaModel
from transformers.models.mistral.modeling_mistral import MistralModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

from logitengine.kv_cache import LayerShape, PagedKVCache
from logitengine.stored_weights import StoredWeights

LLAMA_FAMILY = (LlamaModel, MistralModel, Qwen2Model, Qwen3Model)


class FusedDecoder(nn.Module):
    """A whole decoder of the Llama family: embedding, layers, final norm. The residual stream is float32."""

    def __init__(self, decoder: Any, packer: Packer, shapes: list[LayerShape]) -> None:
        super().__init__()
        self._embedding = decoder.embed_tokens
        self._rotary = decoder.rotary_emb
        self._norm = decoder.norm.weight.detach().float()
        self._eps: float = decoder.norm.variance_epsilon
        self._layers = [
            _pack_layer(layer, packer, f"model.layers.{index}", shape)
            for index, (layer, shape) in enumerate(zip(decoder.layers, shapes, strict=True))
        ]

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        kv_cache: PagedKVCache,
        attention_metadata: AttentionMetadata,
        kernels: Kernels,
        use_cache: bool = False,
    ) -> BaseModelOutputWithPast:
        """``input_ids`` and ``position_ids`` [1, T] -> float32 hidden states [1, T, H]."""
        hidden = self._embedding(input_ids[0]).float()
        cos, sin = (table[0] for table in self._rotary(hidden, position_ids))
        hidden = kernels.decoder_layers(
            hidden, self._layers, cos, sin, kv_cache.keys, kv_cache.values, attention_metadata
        )
        return BaseModelOutputWithPast(
            last_hidden_state=kernels.rms_norm(hidden, self._norm, self._eps)[None]
        )


class FusedLinear(nn.Module):
    """A linear layer over the kernels' own packing of its weight."""

    def __init__(self, packed: Any, kernels: Kernels) -> None:
        super().__init__()
        self._kernels = kernels
        self._packed = packed

    def forward(self, x: Tensor) -> Tensor:
        leading = x.shape[:-1]
        output: Tensor = self._kernels.linear(x.reshape(-1, x.shape[-1]), self._packed)
        return output.reshape(*leading, -1)


class Packer:
    """Packs linear layers for the kernels: as stored in the GGUF file where that was kept, else from their weights."""

    def __init__(self, kernels: Kernels, stored: StoredWeights | None, *, exact: bool) -> None:
        self.kernels = kernels
        self._stored = stored
        self._exact = exact

    def pack(self, linears: dict[str, nn.Linear]) -> Any:
        """Several layers over the same input as one, by parameter name without ``.weight``."""
        biases: list[Tensor] = [
            linear.bias.detach() for linear in linears.values() if linear.bias is not None
        ]
        if biases and len(biases) != len(linears):
            raise ValueError(f"of {', '.join(linears)} some have a bias and some have none")
        bias = torch.cat(biases) if biases else None
        stored = [self._stored.get(f"{name}.weight") if self._stored else None for name in linears]
        blocks = [weight for weight in stored if weight is not None]
        formats = {weight.format for weight in blocks}
        if len(blocks) == len(linears) and len(formats) == 1 and formats <= self.kernels.gguf_formats:
            raw = torch.cat([weight.raw for weight in blocks])
            shape = (raw.shape[0], blocks[0].shape[1])
            return self.kernels.pack_stored(raw, shape, formats.pop(), bias, exact=self._exact)
        weight = torch.cat([linear.weight.detach() for linear in linears.values()])
        return self.kernels.pack_linear(weight, bias)


def fuse(model: PreTrainedModel, packer: Packer, shapes: list[LayerShape]) -> int:
    """Swap what can be swapped, in place; returns how many modules were."""
    decoder = getattr(model, model.base_model_prefix)
    if type(decoder) not in LLAMA_FAMILY or not all(_is_known(layer) for layer in decoder.layers):
        return 0
    setattr(model, model.base_model_prefix, FusedDecoder(decoder, packer, shapes))
    if isinstance(getattr(model, "lm_head", None), nn.Linear):
        model.lm_head = FusedLinear(packer.pack({"lm_head": model.lm_head}), packer.kernels)
    return len(decoder.layers) + 2


def _is_known(layer: Any) -> bool:
    return bool(layer.self_attn.config.hidden_act == "silu")


def _pack_layer(layer: Any, packer: Packer, name: str, shape: LayerShape) -> DecoderLayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    config = attention.config
    weights = DecoderLayerWeights(
        input_norm=layer.input_layernorm.weight.detach().float(),
        qkv=packer.pack(_named(attention, f"{name}.self_attn", "q_proj", "k_proj", "v_proj")),
        q_norm=_norm_weight(attention, "q_norm"),
        k_norm=_norm_weight(attention, "k_norm"),
        output=packer.pack(_named(attention, f"{name}.self_attn", "o_proj")),
        post_attention_norm=layer.post_attention_layernorm.weight.detach().float(),
        gate_up=packer.pack(_named(mlp, f"{name}.mlp", "gate_proj", "up_proj")),
        down=packer.pack(_named(mlp, f"{name}.mlp", "down_proj")),
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=attention.head_dim,
        eps=layer.input_layernorm.variance_epsilon,
        scale=attention.scaling,
        sliding_window=shape.sliding_window,
    )
    return packer.kernels.prepare_layer(weights)


def _norm_weight(attention: nn.Module, name: str) -> Tensor | None:
    norm = getattr(attention, name, None)
    return None if norm is None else norm.weight.detach().float()


def _named(module: nn.Module, prefix: str, *children: str) -> dict[str, nn.Linear]:
    return {f"{prefix}.{child}": getattr(module, child) for child in children}
