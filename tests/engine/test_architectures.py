"""Tiny random models of several families: rows equal transformers' eager float32 logits, or are refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import transformers
from logitengine.config import EngineConfig
from logitengine.errors import CheckpointError
from logitengine.model.loader import load
from safetensors.torch import save_file
from support import EVERY_ROW, greedy, make_engine, reference_logits, run

TOLERANCE = 5e-4
PROMPT = [
    5,
    100,
    7,
    300,
    12,
    12,
    9,
    44,
    210,
    77,
    8,
    3,
    99,
    250,
    31,
    64,
    17,
    200,
    6,
    1,
    90,
    41,
    33,
    7,
    7,
    12,
    150,
    2,
]

COMMON: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}

FUSED: dict[str, dict[str, Any]] = {
    "Llama": {"attention_bias": False, "tie_word_embeddings": True},
    "Mistral": {"sliding_window": 9},
    "Qwen2": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}},
    "Qwen3": {},
    "Gemma": {"hidden_act": "gelu_pytorch_tanh"},
    "Gemma2": {"sliding_window": 7, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 4.0},
    "Gemma3": {
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
}
AS_THEY_ARE: dict[str, dict[str, Any]] = {
    "Cohere": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.7},
    "Olmo2": {},
    "DeepseekV3": {
        "num_key_value_heads": 4,
        "q_lora_rank": 32,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "head_dim": 16,
    },
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "GptOss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
        "rope_parameters": PLAIN_ROPE,
    },
    "Phi3": {},
}


def save_tiny(directory: Path, family: str, options: dict[str, Any], tokenizer: Path) -> None:
    torch.manual_seed(7)
    name = "Gemma3Text" if family == "Gemma3" else family  # Gemma3Config is the multimodal model's
    config = getattr(transformers, f"{name}Config")(**{**COMMON, **options})
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(parameter, mean=0.5, std=0.3)
    model.save_pretrained(directory)
    (directory / "tokenizer.json").write_bytes((tokenizer / "tokenizer.json").read_bytes())


INTERPRETED = ("Qwen2", "Gemma2", "Cohere", "Qwen3Moe", "GptOss", "DeepseekV3")
"""Families that together reach every way through the Triton kernels; each takes half a minute in the interpreter."""


@pytest.mark.parametrize(
    ("family", "kernels"),
    [
        *((family, "auto") for family in [*FUSED, *AS_THEY_ARE]),
        *(pytest.param(family, "triton", marks=pytest.mark.interpreted) for family in INTERPRETED),
    ],
)
def test_rows_are_the_models_in_every_family(
    tmp_path: Path,
    tiny_llama: Path,
    caplog: pytest.LogCaptureFixture,
    family: str,
    kernels: Literal["auto", "triton"],
) -> None:
    """Chunks of 5 and decoding use the paged cache, while the reference reads the sequence whole."""
    save_tiny(tmp_path, family, FUSED.get(family) or AS_THEY_ARE.get(family) or {}, tiny_llama)
    config = EngineConfig(
        model=str(tmp_path), dtype="float32", kernels=kernels, kv_cache_bytes=1 << 24, num_threads=1
    )
    with caplog.at_level(logging.INFO, "logitengine.model.loader"):
        loaded = load(config)
    assert (f"{loaded.kernels.name} kernels, fused" in caplog.text) == (family in FUSED)
    if loaded.kernels.name == "cpu":
        assert loaded.info.batch_invariant == (family in FUSED)
    assert loaded.info.architecture == f"{family}ForCausalLM"
    answer = run(
        make_engine(loaded, max_prefill_chunk=5),
        [greedy("a", PROMPT, 3 if kernels == "triton" else 6, EVERY_ROW)],
    )["a", 0]
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    expected = reference_logits(model, PROMPT + answer.token_ids)
    np.testing.assert_allclose(answer.prompt_rows, expected[: len(PROMPT)], atol=TOLERANCE)
    np.testing.assert_allclose(answer.rows, expected[len(PROMPT) - 1 : -1], atol=TOLERANCE)


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        (
            "Phi3",
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "short_factor": [1.0] * 8,
                    "long_factor": [2.0] * 8,
                    "original_max_position_embeddings": 128,
                }
            },
            "longrope rotary embeddings",
        ),
        ("Qwen3Next", {"num_experts": 4, "num_experts_per_tok": 2}, "layers of type linear_attention"),
    ],
)
def test_what_would_be_silently_wrong_is_refused(
    tmp_path: Path, tiny_llama: Path, family: str, options: dict[str, Any], reason: str
) -> None:
    config = getattr(transformers, f"{family}Config")(
        **{**COMMON, **options}, architectures=[f"{family}ForCausalLM"]
    )
    config.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((tiny_llama / "tokenizer.json").read_bytes())
    # The config is refused before any weight is read.
    tensors = {str(layer): torch.zeros(1) for layer in range(config.num_hidden_layers)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=reason):
        load(EngineConfig(model=str(tmp_path), dtype="float32", kv_cache_bytes=1 << 24))


def test_a_head_that_cannot_run_by_itself_is_refused_at_load(tmp_path: Path, tiny_llama: Path) -> None:
    config = transformers.GPT2Config(
        vocab_size=320, n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((tiny_llama / "tokenizer.json").read_bytes())
    with pytest.raises(CheckpointError, match="the head of GPT2LMHeadModel cannot be served"):
        load(EngineConfig(model=str(tmp_path), dtype="float32", kv_cache_bytes=1 << 24))
