"""Tiny random models, saved without a tokenizer in directories that an engine loads quickly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

NAN_TOKEN = 299
"""Id whose embedding is NaN in models saved with ``has_nan``. Rows after this token have no distribution."""

_COMMON: dict[str, Any] = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}


def save_llama(directory: Path, *, vocab_size: int, has_nan: bool = False, **options: Any) -> Path:
    """Save a model of the Llama family and return ``directory``.

    The model has two layers unless ``options``, fields of its config, say otherwise.
    """
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 32}
    config = LlamaConfig(**{**_COMMON, **shape, **options}, vocab_size=vocab_size)
    return _save(directory, LlamaForCausalLM, config, has_nan=has_nan)


def save_gemma3(directory: Path, *, vocab_size: int, **options: Any) -> Path:
    """Save three layers of Gemma 3, two of them with a sliding window, and return ``directory``.

    The family differs from Llama in its many norms, two rotary embeddings and GELU. ``options`` are more fields of its
    config.
    """
    config = Gemma3TextConfig(
        **{**_COMMON, "initializer_range": 0.2},
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        head_dim=16,
        pad_token_id=0,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        **options,
    )
    return _save(directory, Gemma3ForCausalLM, config)


def _save(
    directory: Path, model_class: type[PreTrainedModel], config: PreTrainedConfig, *, has_nan: bool = False
) -> Path:
    torch.manual_seed(7)
    model = model_class(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, mean=0.5, std=0.3)
    if has_nan:
        embedding: Any = model.get_input_embeddings()
        embedding.weight.data[NAN_TOKEN] = torch.nan
    model.save_pretrained(directory)
    # The engine is given token ids and only checks that this file exists.
    (directory / "tokenizer.json").write_text("{}")
    return directory
