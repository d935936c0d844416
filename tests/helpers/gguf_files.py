"""GGUF files of transformers' models, written by gguf's own writer and by its own table of names.

What llama.cpp's conversion does to the numbers is done here: rows of queries and keys in the order of rotary
pairs, norms of the Gemma family plus 1, the experts' gates and ups apart, gpt-oss's experts transposed, and DeepSeek's
projections of keys and values in one tensor or, beside the key ``attention.key_length_mla``, in two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter, get_tensor_name_map
from gguf.quants import quantize
from numpy.typing import NDArray
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedModel

ARCHITECTURES = {name: number for number, name in MODEL_ARCH_NAMES.items()}
PAIRED = {"llama", "granite", "smollm3"}
SHIFTED = {"gemma", "gemma2", "gemma3"}

Edit = Callable[[GGUFWriter], None]


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    architecture: str,
    keys: Mapping[str, Any],
    *,
    kind: str | Callable[[str], str] = "F32",
    blocks: Mapping[str, tuple[str, NDArray[np.uint8]]] | None = None,
    extra: Mapping[str, NDArray[Any]] | None = None,
    num_tokens: int | None = None,
    split: int = 0,
    pre: str = "gpt-2",
) -> Path:
    """Write the model, its matrices in ``kind`` (of their names, if it is a function), with ``keys`` beside the common ones; None leaves a key out.

    Tensors in ``blocks``, formats and bytes by the tensors' names, are written so instead. With ``split`` it is written
    in parts of so many tensors.
    """
    writer = GGUFWriter(path, architecture, split_max_tensors=split)
    config = model.config
    head_dim = getattr(model.model.layers[0].self_attn, "head_dim", None)
    common = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": getattr(config, "rms_norm_eps", None),
        "rope.dimension_count": head_dim,
        "rope.freq_base": _theta(config),
        "expert_count": getattr(config, "num_local_experts", getattr(config, "num_experts", None)),
        "expert_used_count": getattr(config, "num_experts_per_tok", None),
        "expert_feed_forward_length": getattr(config, "moe_intermediate_size", None),
    }
    for key, value in (common | dict(keys)).items():
        if value is not None:
            add_key(writer, f"{architecture}.{key}", value)
    add_vocabulary(writer, num_tokens or config.vocab_size, pre)
    for name, numbers in tensors_of(model, architecture, keys).items():
        if name in (blocks or {}):
            own, raw = (blocks or {})[name]
            writer.add_tensor(name, raw, raw_dtype=GGMLQuantizationType[own])
            continue
        own = kind if isinstance(kind, str) else kind(name)
        add_tensor(writer, name, numbers, own if name.endswith("weight") and numbers.ndim > 1 else "F32")
    for name, numbers in (extra or {}).items():
        add_tensor(writer, name, numbers, "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_key(writer: GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)


def add_tensor(writer: GGUFWriter, name: str, numbers: NDArray[Any], kind: str) -> None:
    number = GGMLQuantizationType[kind]
    writer.add_tensor(name, quantize(numbers, number), raw_dtype=number)


def add_vocabulary(writer: GGUFWriter, num_tokens: int, pre: str = "gpt-2") -> None:
    """Add a vocabulary of bytes, one merge, and tokens that no text gives; ``pre`` names how text is split."""
    tokens = [*sorted(ByteLevel.alphabet()), "he"]
    tokens += [f"token{index}" for index in range(len(tokens), num_tokens)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens[:num_tokens])
    writer.add_token_types([1] * num_tokens)
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _theta(config: Any) -> float:
    parameters = config.rope_parameters
    theta: float = parameters.get("full_attention", parameters)["rope_theta"]
    return theta


def tensors_of(model: PreTrainedModel, architecture: str, keys: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """Return the file's tensors in float32, by name."""
    config = model.config
    names = get_tensor_name_map(ARCHITECTURES[architecture], config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    found: dict[str, NDArray[Any]] = {}
    for name, tensor in model.state_dict().items():
        if name in model.all_tied_weights_keys:
            continue
        numbers = tensor.detach().to(torch.float32).numpy()
        part = name.split(".")[-2]
        if part == "experts" or name.endswith(("sinks", "e_score_correction_bias")) or part == "kv_b_proj":
            found |= _apart(name, numbers, config, is_split="attention.key_length_mla" in keys)
            continue
        if architecture in PAIRED and part in heads:
            numbers = (
                numbers.reshape(heads[part], 2, -1, *numbers.shape[1:]).swapaxes(1, 2).reshape(numbers.shape)
            )
        if architecture in SHIFTED and "norm" in part:
            numbers = numbers + 1
        renamed = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert renamed is not None, name
        found[renamed] = np.ascontiguousarray(numbers)
    return found


def _apart(name: str, numbers: NDArray[Any], config: Any, *, is_split: bool) -> dict[str, NDArray[Any]]:
    """Return the tensors of a parameter that the file has in another form."""
    block, part = f"blk.{name.split('.')[2]}", name.rsplit(".", maxsplit=1)[-1]
    kind = "bias" if part.endswith("bias") else "weight"
    if part == "sinks":
        return {f"{block}.attn_sinks.weight": numbers}
    if part == "e_score_correction_bias":
        return {f"{block}.exp_probs_b.bias": numbers}
    if "kv_b_proj" in name:
        if not is_split:
            return {f"{block}.attn_kv_b.weight": numbers}
        by_head = numbers.reshape(config.num_attention_heads, -1, numbers.shape[1])
        keys, values = np.split(by_head, [config.qk_nope_head_dim], axis=1)
        return {
            f"{block}.attn_k_b.weight": np.ascontiguousarray(keys.swapaxes(1, 2)),
            f"{block}.attn_v_b.weight": np.ascontiguousarray(values),
        }
    is_woven = config.model_type == "gpt_oss"
    if is_woven and kind == "weight":
        numbers = np.ascontiguousarray(numbers.swapaxes(1, 2))
    if part.startswith("down"):
        return {f"{block}.ffn_down_exps.{kind}": numbers}
    gate, up = (numbers[:, ::2], numbers[:, 1::2]) if is_woven else np.split(numbers, 2, axis=1)
    return {
        f"{block}.ffn_gate_exps.{kind}": np.ascontiguousarray(gate),
        f"{block}.ffn_up_exps.{kind}": np.ascontiguousarray(up),
    }
