"""Sources of weights for a model's linear layers: its own parameters, blocks of a GGUF file, or int8 blocks.

Conversion writes the blocks of a GGUF file once, to a safetensors file of uint8 rows named like the model's
parameters. A parameter is included only if its dequantised blocks are exactly the weights that transformers
read from the same file.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize, quantize
from logitkernels import BlockWeight, DenseWeight, Weight
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

FILE_NAME = "blocks.safetensors"

BLOCK_WEIGHTS = 32
FORMATS = ("Q4_0", "Q4_1", "Q8_0")

LAYER_TENSORS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


class WeightSource(Protocol):
    """Weights [N, K] by the name of the model's parameter."""

    def get(self, name: str) -> Weight: ...


class ModelWeights:
    """A model's own parameters."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def get(self, name: str) -> DenseWeight:
        """Return the parameter. Raises AttributeError for a name that the model does not have."""
        return DenseWeight(name, self._model.get_parameter(name).detach())


class StoredWeights:
    """Stored blocks by name; another source's weights for all other names."""

    def __init__(self, blocks: dict[str, BlockWeight], otherwise: WeightSource) -> None:
        self._blocks = blocks
        self._otherwise = otherwise

    @property
    def formats(self) -> list[str]:
        """The formats of the blocks."""
        return sorted({weight.format for weight in self._blocks.values()})

    def get(self, name: str) -> Weight:
        return self._blocks.get(name) or self._otherwise.get(name)


class Int8Weights:
    """Weights of any model in blocks of Q8_0: 32 int8 along K under one float16 scale. Made on request."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def get(self, name: str) -> BlockWeight:
        """Return the blocks. Raises ValueError for a weight whose rows are not a whole number of blocks."""
        weight = self._model.get_parameter(name).detach()
        rows, columns = weight.shape
        if columns % BLOCK_WEIGHTS:
            raise ValueError(f"{name} has {columns} input features; int8 takes multiples of {BLOCK_WEIGHTS}")
        raw = quantize(weight.float().cpu().numpy(), GGMLQuantizationType.Q8_0)
        return BlockWeight(name, torch.from_numpy(raw), "Q8_0", (rows, columns))


def load_stored_blocks(directory: Path) -> dict[str, BlockWeight] | None:
    """Return a conversion's stored blocks by parameter name; None if there are none (a Hugging Face directory)."""
    path = directory / FILE_NAME
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        formats = file.metadata()
        weights = {}
        for name in file.keys():  # noqa: SIM118 - not a mapping
            raw, (block_format, columns) = file.get_tensor(name), formats[name].split()
            weights[name] = BlockWeight(name, raw, block_format, (raw.shape[0], int(columns)))
    return weights


def write_stored_blocks(gguf: Path, model: PreTrainedModel, directory: Path) -> None:
    """Copy the blocks of ``gguf`` that hold linear layers of ``model`` (float32, from the same file)."""
    tensors = {tensor.name: tensor for tensor in GGUFReader(gguf).tensors}
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    blocks: dict[str, Tensor] = {}
    formats: dict[str, str] = {}
    for name, weight in model.state_dict().items():
        tensor = next((tensors[key] for key in _gguf_names(name) if key in tensors), None)
        if tensor is None or tensor.tensor_type.name not in FORMATS:
            continue
        raw = np.array(tensor.data).reshape(weight.shape[0], -1)
        dense = dequantize(raw, tensor.tensor_type)
        for order in _row_orders(weight.shape[0], heads.get(name.split(".")[-2])):
            if np.array_equal(dense[order], weight.numpy()):
                blocks[name] = torch.from_numpy(raw[order])
                formats[name] = f"{tensor.tensor_type.name} {weight.shape[1]}"
                break
    if blocks:
        save_file(blocks, directory / FILE_NAME, metadata=formats)


def _gguf_names(parameter: str) -> list[str]:
    """Return the names that a GGUF file may give a linear layer's weight."""
    if parameter == "lm_head.weight":
        return ["output.weight", "token_embd.weight"]
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", parameter)
    if match is None or match[2] not in LAYER_TENSORS:
        return []
    return [f"blk.{match[1]}.{LAYER_TENSORS[match[2]]}.weight"]


def _row_orders(rows: int, num_heads: int | None) -> list[NDArray[np.int64]]:
    """Return the file's own row order; for queries and keys also the one without GGUF's interleaved rotary pairs."""
    own = np.arange(rows)
    if num_heads is None:
        return [own]
    return [own, own.reshape(num_heads, -1, 2).swapaxes(1, 2).reshape(rows)]
