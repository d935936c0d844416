"""Checkpoints whose linear layers are packed in 4 bits, written by the formats' published descriptions.

AWQ: AutoAWQ's ``WQLinear_GEMM``. GPTQ: GPTQModel's ``TorchQuantLinear.pack``. compressed-tensors: ``pack_to_int32``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from logitengine.model.network.experts import expert_names, is_stacked, parse_expert, stacked_weight
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Column of a word that each of its nibbles holds, the lowest first."""

Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Packing:
    """How `save_packed` packs linear layers.

    Attributes:
        group_size: -1 for whole rows.
        has_zeros: whether zeros are random; else all are 8.
        checkpoint_format: of GPTQ: ``gptq`` stores zeros less 1, ``gptq_v2`` as they are.
        is_ordered: whether the groups of columns follow no order (``desc_act``, ``actorder``).
        dtype: of scales.
        skipped: names of linear layers that are not packed.
        fields: further members of the quantization_config; None leaves one out.
    """

    method: str
    group_size: int = 32
    has_zeros: bool = True
    checkpoint_format: str = "gptq"
    is_ordered: bool = False
    dtype: torch.dtype = torch.float16
    skipped: tuple[str, ...] = ("lm_head",)
    fields: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = [self.method, str(self.group_size), "zeros" * self.has_zeros, "ordered" * self.is_ordered]
        return "-".join(filter(None, parts))


def tiny_llama(**options: Any) -> PreTrainedModel:
    """Return a random model whose numbers float16 holds exactly."""
    torch.manual_seed(5)
    config = LlamaConfig(
        **{
            "vocab_size": 304,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "initializer_range": 0.2,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        | options
    )
    model: PreTrainedModel = LlamaForCausalLM(config).eval()
    return in_float16(model)


def in_float16(model: PreTrainedModel) -> PreTrainedModel:
    """Round the parameters to float16."""
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()
    return model


def save_packed(
    directory: Path, packing: Packing, model: PreTrainedModel | None = None, *, num_files: int = 1
) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """Pack the model's linear layers into random integers, and save it without a tokenizer.

    Returns the model with the weights that it was saved with, and those of packed layers in float64.
    """
    model = model or tiny_llama()
    tensors = {name: tensor.half() for name, tensor in model.state_dict().items()}
    for tied in model.all_tied_weights_keys:
        tensors.pop(tied, None)
    weights: dict[str, Tensor] = {}
    generator = np.random.default_rng(7)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name not in packing.skipped:
            packed, weight = pack_layer(packing, module.out_features, module.in_features, generator)
            del tensors[f"{name}.weight"]
            tensors |= {f"{name}.{own}": tensor for own, tensor in packed.items()}
            weights[f"{name}.weight"] = weight
            module.weight = nn.Parameter(weight.float(), requires_grad=False)
        elif is_stacked(module):
            for index in range(module.num_experts):
                gate_up, down = expert_names(name, index)
                for own in (*gate_up, down):
                    expert = parse_expert(own)
                    assert expert is not None
                    matrix = stacked_weight(module, expert)
                    packed, weights[own] = pack_layer(packing, len(matrix), matrix.shape[1], generator)
                    tensors |= {
                        f"{own.removesuffix('weight')}{part}": tensor for part, tensor in packed.items()
                    }
                    matrix.data.copy_(weights[own])
            for own, _ in module.named_parameters():
                del tensors[f"{name}.{own}"]
    config = model.config.to_dict() | {
        "architectures": [type(model).__name__],
        "quantization_config": quantization_config(packing),
    }
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text("{}")  # the engine is given token ids
    _save(directory, tensors, num_files)
    return model, weights


def quantization_config(packing: Packing) -> dict[str, Any]:
    fields: dict[str, Any] = {"quant_method": packing.method}
    if packing.method == "awq":
        fields |= {"bits": 4, "group_size": packing.group_size, "zero_point": True, "version": "gemm"}
        fields["modules_to_not_convert"] = list(packing.skipped)
    elif packing.method == "gptq":
        fields |= {"bits": 4, "group_size": packing.group_size, "sym": not packing.has_zeros}
        fields |= {"desc_act": packing.is_ordered, "checkpoint_format": packing.checkpoint_format}
    else:
        weights = {
            "num_bits": 4,
            "type": "int",
            "symmetric": not packing.has_zeros,
            "strategy": "channel" if packing.group_size == -1 else "group",
            "group_size": None if packing.group_size == -1 else packing.group_size,
            "actorder": "group" if packing.is_ordered else None,
            "dynamic": False,
        }
        fields |= {
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "ignore": list(packing.skipped),
            "kv_cache_scheme": None,
            "config_groups": {
                "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}
            },
        }
    fields |= packing.fields
    return {name: value for name, value in fields.items() if value is not None}


def pack_layer(
    packing: Packing, rows: int, depth: int, generator: np.random.Generator
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the tensors of a random layer by their own names, and its weight [rows, depth] in float64."""
    size = depth if packing.group_size == -1 else packing.group_size
    num_groups = depth // size
    integers = generator.integers(0, 16, (rows, depth))
    scales = torch.from_numpy(generator.uniform(0.01, 0.05, (rows, num_groups))).to(packing.dtype)
    least = 1 if packing.method == "gptq" and packing.checkpoint_format == "gptq" else 0
    zeros = generator.integers(least, 16, (rows, num_groups))
    if not packing.has_zeros:
        zeros[:] = 8
    groups = np.arange(depth) // size
    if packing.is_ordered:
        groups = generator.permutation(groups)
    weight = scales.double()[:, groups] * torch.from_numpy((integers - zeros[:, groups]).astype(np.float64))
    return TENSORS[packing.method](packing, integers, scales, zeros, groups), weight


def _awq(
    packing: Packing, integers: Integers, scales: Tensor, zeros: Integers, groups: Integers
) -> dict[str, Tensor]:
    del packing, groups
    return {
        "qweight": words(integers.T, AWQ_ORDER),
        "qzeros": words(zeros.T, AWQ_ORDER),
        "scales": scales.T.contiguous(),
    }


def _gptq(
    packing: Packing, integers: Integers, scales: Tensor, zeros: Integers, groups: Integers
) -> dict[str, Tensor]:
    less = 1 if packing.checkpoint_format == "gptq" else 0
    return {
        "qweight": words(integers).T.contiguous(),
        "qzeros": words(zeros.T - less),
        "scales": scales.T.contiguous(),
        "g_idx": torch.from_numpy(groups.astype(np.int32)),
    }


def _compressed_tensors(
    packing: Packing, integers: Integers, scales: Tensor, zeros: Integers, groups: Integers
) -> dict[str, Tensor]:
    tensors = {
        "weight_packed": words(integers),
        "weight_scale": scales,
        "weight_shape": torch.tensor(integers.shape),
    }
    if packing.has_zeros:
        tensors["weight_zero_point"] = words(zeros.T).T.contiguous()
    if packing.is_ordered:
        tensors["weight_g_idx"] = torch.from_numpy(groups.astype(np.int32))
    return tensors


TENSORS = {"awq": _awq, "gptq": _gptq, "compressed-tensors": _compressed_tensors}


def words(integers: Integers, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Put eight neighbours of [..., K] into an int32 [..., K / 8]; nibble i, from the lowest, holds number ``order[i]``.

    The last word is filled up with zeros.
    """
    missing = -integers.shape[-1] % 8
    padded = np.concatenate([integers, np.zeros((*integers.shape[:-1], missing), integers.dtype)], axis=-1)
    eights = padded.reshape(*integers.shape[:-1], -1, 8)
    packed = np.zeros(eights.shape[:-1], dtype=np.uint32)
    for nibble, place in enumerate(order):
        packed |= eights[..., place].astype(np.uint32) << np.uint32(4 * nibble)
    return torch.from_numpy(packed.view(np.int32))


def _save(directory: Path, tensors: dict[str, Tensor], num_files: int) -> None:
    if num_files == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return
    places: dict[str, str] = {}
    for part in range(num_files):
        file = f"model-{part + 1:05d}-of-{num_files:05d}.safetensors"
        own = dict(list(tensors.items())[part::num_files])
        save_file(own, directory / file, metadata={"format": "pt"})
        places |= dict.fromkeys(own, file)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
