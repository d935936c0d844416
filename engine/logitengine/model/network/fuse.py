"""Conversion of well-known architectures to networks of the project's kernels.

A model is recognised by its class and its config, and checked. An unknown variation (a bias, a norm of
another kind) keeps transformers' own modules and only runs slower.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, Literal

import torch
from logitkernels import AttentionOptions, BlockWeight, DecoderLayerWeights, Kernels, Linear
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.models.gemma.modeling_gemma import GemmaForCausalLM, GemmaModel, GemmaRMSNorm
from transformers.models.gemma2.modeling_gemma2 import Gemma2ForCausalLM, Gemma2Model, Gemma2RMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3ForCausalLM, Gemma3RMSNorm, Gemma3TextModel
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaModel
from transformers.models.mistral.modeling_mistral import MistralForCausalLM, MistralModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM, Qwen2Model
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLTextModel
from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM, Qwen3Model
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel

from logitengine.model.image_text.text_part import PlainTextPart
from logitengine.model.network.fused_linear import FusedLinear
from logitengine.model.network.layer_shapes import LayerShape
from logitengine.model.network.network import Decoder, Head, Network, TransformersHead
from logitengine.model.parameter_names import HEAD_PARAMETER
from logitengine.model.weight_sources import WeightSource
from logitengine.run.batch import DeviceBatch
from logitengine.run.kv_cache import PagedKVCache

QWEN_VL_FAMILY = (Qwen2VLTextModel, Qwen2_5_VLTextModel, Qwen3VLTextModel)
LLAMA_FAMILY = (LlamaModel, MistralModel, Qwen2Model, Qwen3Model, *QWEN_VL_FAMILY)
GEMMA_FAMILY = (GemmaModel, Gemma2Model, Gemma3TextModel)
PLAIN_HEADS = (
    LlamaForCausalLM,
    MistralForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    GemmaForCausalLM,
    PlainTextPart,
)
"""Models whose logits are the output of the linear layer."""

CAPPED_HEADS = (Gemma2ForCausalLM, Gemma3ForCausalLM)
"""Models whose logits are bounded by the config's ``final_logit_softcapping``, if it is set."""

MOST_TABLED_POSITIONS = 1 << 15
"""Positions with tabled cosines and sines: 16 MiB in all for a head of 128."""

Lookup = Callable[[Tensor], Tensor]
"""Embedding of token ids, [T] -> [T, H]."""

Activation = Literal["silu", "gelu_tanh"]
ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
"""Activations that the kernels have, by transformers' names."""


@dataclass(frozen=True, slots=True)
class _Run:
    """Successive layers that share one rotary embedding; ``rope`` names it if the model has several (Gemma 3)."""

    rope: str | None
    layers: list[DecoderLayerWeights]
    start: int

    @property
    def indices(self) -> slice:
        return slice(self.start, self.start + len(self.layers))


class FusedNetwork(Network):
    """Model of the Llama or Gemma family: embedding, layers, final norm. The residual stream is float32.

    Attributes:
        linears: linear layers by the names of their weights; several names may map to one layer.
    """

    is_fused = True

    def __init__(
        self,
        decoder: Any,
        layers: list[DecoderLayerWeights],
        head: Head,
        linears: dict[str, Linear],
        kernels: Kernels,
        depth: int = 0,
        embedding: Lookup | None = None,
    ) -> None:
        """Take a decoder's parts, or ``embedding`` in place of its own. After each of the first ``depth`` layers images add to the residual stream."""
        self.head = head
        self.linears = linears
        self._kernels = kernels
        self._embedding = embedding or _embedding(decoder.embed_tokens)
        self._norm = _norm_weight(decoder.norm)
        self._eps = _eps(decoder.norm)
        ropes = _ropes(decoder)
        self._rotary = {rope: Rotary(decoder.rotary_emb, rope) for rope in dict.fromkeys(ropes)}
        self._runs = [
            _Run(rope, layers[indices[0] : indices[-1] + 1], indices[0])
            for rope, indices in (
                (ropes[group[0]], group)
                for _, members in groupby(range(len(layers)), key=lambda i: (ropes[i], min(i, depth)))
                for group in [list(members)]
            )
        ]

    def decoder(self, kv_cache: PagedKVCache) -> Decoder:
        runs = [
            (
                run,
                self._kernels.bind_layers(
                    run.layers, kv_cache.keys[run.indices], kv_cache.values[run.indices]
                ),
            )
            for run in self._runs
        ]

        def decode(batch: DeviceBatch) -> Tensor:
            hidden = self._embedding(batch.input_ids).float()
            for rows, features in batch.features:
                hidden[rows] = features[:, 0].float()
            tables = {rope: rotary(batch.position_ids) for rope, rotary in self._rotary.items()}
            for run, layers in runs:
                hidden = layers(hidden, *tables[run.rope], batch.metadata)
                for rows, features in batch.features:
                    if run.indices.stop < features.shape[1]:
                        hidden[rows] += features[:, run.indices.stop].float()
            return self._kernels.rms_norm(hidden, self._norm, self._eps)

        return decode


class Rotary:
    """Cosines and sines, float32 [T, R], of the model's own rotary module for positions int64 [T] or [3, T].

    They come from a table if they depend on nothing but the position and the table is small. With three rows of positions
    each column follows one of them, as the module has it.
    """

    def __init__(self, module: Any, rope: str | None) -> None:
        self._module = module
        self._arguments = [] if rope is None else [rope]
        kind: str = module.rope_type if rope is None else module.rope_type[rope]
        buffer = next(module.buffers())
        self._any = torch.empty(0, dtype=torch.float32, device=buffer.device)
        self._table: tuple[Tensor, Tensor] | None = None
        bound = module.config.max_position_embeddings
        if kind == "dynamic" and rope is None:
            module.rope_type = (
                "default"  # no sequence is long enough to change it, and asking waits for the device
            )
        if kind != "longrope" and bound <= MOST_TABLED_POSITIONS:
            # The second half of the columns repeats the first.
            cos, sin = self._compute(torch.arange(bound, device=buffer.device))
            half = cos.shape[1] // 2
            self._table = cos[:, :half].contiguous(), sin[:, :half].contiguous()

        self._axes: Tensor | None = None
        if self._table is not None and hasattr(module, "mrope_section"):
            sin = self._table[1]
            probe = self._compute(torch.arange(3, device=buffer.device)[:, None])[1][:, : sin.shape[1]]
            # The sine differs at 0, 1 and 2 in every column.
            self._axes = (sin[:3] - probe).abs().argmin(0)

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        if self._table is None:
            return self._compute(positions)
        cos, sin = self._table
        if positions.ndim == 1:
            return _twice(cos.index_select(0, positions)), _twice(sin.index_select(0, positions))
        assert self._axes is not None  # noqa: S101 - only models with three axes have such positions
        places = positions.t()[:, self._axes]
        return _twice(cos.gather(0, places)), _twice(sin.gather(0, places))

    @torch.inference_mode()
    def _compute(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Compute what the module gives. Where it knows three axes, one row of positions stands for all of them."""
        rows = positions[None] if positions.ndim == 1 else positions[:, None]
        cos, sin = self._module(self._any, rows, *self._arguments)
        return cos[0], sin[0]


def _twice(half: Tensor) -> Tensor:
    """Return the columns twice, side by side. ``repeat`` takes three times as long: 1 % of a small model's step."""
    return torch.cat((half, half), 1)


class Packer:
    """Packs linear layers for the kernels.

    Attributes:
        linears: packed layers, by the names of their weights.
        formats: formats of the packed weights; `dense` for those in no blocks.
        source: where the weights come from.
    """

    def __init__(self, kernels: Kernels, source: WeightSource, *, exact: bool) -> None:
        self.kernels = kernels
        self.linears: dict[str, Linear] = {}
        self.formats: set[str] = set()
        self.source = source
        self._exact = exact

    def pack(self, linears: dict[str, nn.Linear]) -> Linear:
        """Pack several layers over the same input as one, by parameter name without ``.weight``."""
        biases: list[Tensor] = [
            linear.bias.detach() for linear in linears.values() if linear.bias is not None
        ]
        if biases and len(biases) != len(linears):
            raise ValueError(f"of {', '.join(linears)} some have a bias and some have none")
        return self.stack([f"{name}.weight" for name in linears], torch.cat(biases) if biases else None)

    def stack(self, names: list[str], bias: Tensor | None) -> Linear:
        """Pack weights over the same input as one layer, with ``bias`` [all N] if there is one."""
        weights = [self.source.get(name) for name in names]
        packed = self.kernels.pack(weights, bias, exact=self._exact)
        self.linears |= dict.fromkeys(packed.names, packed)
        self.formats |= {weight.format if isinstance(weight, BlockWeight) else "dense" for weight in weights}
        return packed


def is_known(model: PreTrainedModel) -> bool:
    """Whether the model's architecture is one that becomes a fused network."""
    decoder = getattr(model, model.base_model_prefix)
    return type(decoder) in LLAMA_FAMILY + GEMMA_FAMILY and all(
        _activation(layer) is not None for layer in decoder.layers
    )


def fuse(
    model: PreTrainedModel,
    packer: Packer,
    shapes: list[LayerShape],
    depth: int = 0,
    embedding: Callable[[Linear | None], Lookup] | None = None,
) -> FusedNetwork:
    """Return a model whose architecture is known (see `is_known`) as a fused network.

    Fusing takes its decoder away, layer by layer. After each of the first ``depth`` layers images add to the residual stream.
    ``embedding`` returns the lookup of token ids, for a model whose own has no weight; it is called with the head
    if that is packed.
    """
    kernels = packer.kernels
    decoder = getattr(model, model.base_model_prefix)
    layers = []
    for index, shape in enumerate(shapes):
        layers.append(_pack_layer(decoder.layers[index], packer, f"model.layers.{index}", shape))
        decoder.layers[index] = nn.Identity()  # frees the layer's own weights before the next one is packed
    head = _fuse_head(model, packer)
    lookup = embedding(packer.linears.get(HEAD_PARAMETER)) if embedding is not None else None
    setattr(model, model.base_model_prefix, None)  # its weights are packed, and nothing else may keep them
    return FusedNetwork(decoder, layers, head, packer.linears, kernels, depth, lookup)


def _fuse_head(model: PreTrainedModel, packer: Packer) -> Head:
    """Return the model's head over a packed weight, which replaces the model's own."""
    if isinstance(getattr(model, "lm_head", None), nn.Linear):
        packed = packer.pack({"lm_head": model.lm_head})
        model.lm_head = FusedLinear(packed)
        if type(model) in PLAIN_HEADS:
            return packed
        if type(model) in CAPPED_HEADS:
            cap = model.config.final_logit_softcapping
            return packed if cap is None else _CappedHead(packed, cap, packer.kernels)
    return TransformersHead(model)


@dataclass(frozen=True, slots=True)
class _CappedHead:
    linear: Linear
    cap: float
    kernels: Kernels

    def __call__(self, hidden: Tensor) -> Tensor:
        return self.kernels.softcap(self.linear(hidden), self.cap)


def _activation(layer: Any) -> Activation | None:
    """Return the activation of the layer's gated MLP, by its module's class; None if the kernels do not have it."""
    for name, activation in ACTIVATIONS.items():
        if type(layer.mlp.act_fn) is type(ACT2FN[name]):
            return activation
    return None


def _pack_layer(layer: Any, packer: Packer, name: str, shape: LayerShape) -> DecoderLayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    config = attention.config
    activation = _activation(layer)
    assert activation is not None  # noqa: S101 - fuse() has checked
    # Gemma 2 and 3 also norm the output of attention and MLP, and name the norms accordingly.
    has_output_norms = hasattr(layer, "pre_feedforward_layernorm")
    mlp_norm = layer.pre_feedforward_layernorm if has_output_norms else layer.post_attention_layernorm
    return DecoderLayerWeights(
        input_norm=_norm_weight(layer.input_layernorm),
        qkv=packer.pack(_named(attention, f"{name}.self_attn", "q_proj", "k_proj", "v_proj")),
        q_norm=_norm_weight(attention.q_norm) if hasattr(attention, "q_norm") else None,
        k_norm=_norm_weight(attention.k_norm) if hasattr(attention, "k_norm") else None,
        output=packer.pack(_named(attention, f"{name}.self_attn", "o_proj")),
        post_attention_norm=_norm_weight(mlp_norm),
        gate_up=packer.pack(_named(mlp, f"{name}.mlp", "gate_proj", "up_proj")),
        down=packer.pack(_named(mlp, f"{name}.mlp", "down_proj")),
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=attention.head_dim,
        eps=_eps(layer.input_layernorm),
        attention=AttentionOptions(attention.scaling, shape.sliding_window, shape.softcap),
        activation=activation,
        attention_output_norm=_norm_weight(layer.post_attention_layernorm) if has_output_norms else None,
        mlp_output_norm=_norm_weight(layer.post_feedforward_layernorm) if has_output_norms else None,
    )


def _embedding(module: nn.Embedding) -> Lookup:
    """Return the module's lookup of token ids, [T] -> [T, H]."""
    if type(module) is nn.Embedding and module.max_norm is None:
        return partial(torch.index_select, module.weight.detach(), 0)
    return module


def _norm_weight(norm: Any) -> Tensor:
    """Return the factor of the normed values, float32. Gemma stores it less 1."""
    weight: Tensor = norm.weight.detach().float()
    return weight + 1 if isinstance(norm, (GemmaRMSNorm, Gemma2RMSNorm, Gemma3RMSNorm)) else weight


def _eps(norm: Any) -> float:
    eps: float = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    return eps


def _ropes(decoder: Any) -> list[str | None]:
    """Return the name of each layer's rotary embedding, or None for each if the model has only one."""
    if isinstance(decoder, Gemma3TextModel):
        return list(decoder.config.layer_types or [])
    return [None] * len(decoder.layers)


def _named(module: nn.Module, prefix: str, *children: str) -> dict[str, nn.Linear]:
    return {f"{prefix}.{child}": getattr(module, child) for child in children}
