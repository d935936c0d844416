"""Metadata of GGUF files: what they say, and leave out, reaches the rows, and what could change them unnoticed is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_cases import CASES, DEEPSEEK, LATENT_KEYS, YARN_KEYS, Case, model_of
from gguf_files import write_gguf
from logitengine.errors import CheckpointError
from support import reference_logits, rows_of, served

PROMPT = list(range(60, 108))


def test_factors_of_rotary_frequencies_are_llama_3s(tmp_path: Path) -> None:
    """The file has what its frequencies are divided by; transformers computes it from the config. Tolerance: 1e-3."""
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    model = model_of(Case("llama", "llama", {"rope_parameters": scaling}))
    own: Any = model.get_submodule("model.rotary_emb")
    plain: Any = model_of(CASES["llama"]).get_submodule("model.rotary_emb")
    factors = (plain.inv_freq / own.inv_freq).numpy()
    assert factors.max() == pytest.approx(8.0)
    path = write_gguf(tmp_path / "model.gguf", model, "llama", {}, extra={"rope_freqs.weight": factors})
    expected = reference_logits(model, PROMPT)
    assert np.abs(rows_of(served(path), PROMPT) - expected).max() <= 1e-3
    without = rows_of(served(write_gguf(tmp_path / "plain.gguf", model, "llama", {})), PROMPT)
    assert np.abs(without - expected).max() > 1e-2


@pytest.mark.parametrize("factors", [np.ones(15), np.zeros(16), np.full(16, np.nan)])
def test_factors_that_no_frequency_can_have_are_refused(
    tmp_path: Path, factors: np.ndarray[Any, Any]
) -> None:
    extra = {"rope_freqs.weight": factors.astype(np.float32)}
    path = write_gguf(tmp_path / "model.gguf", model_of(CASES["llama"]), "llama", {}, extra=extra)
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight is not 16 numbers above 0"):
        served(path)


@pytest.mark.parametrize(
    ("name", "keys", "says"),
    [
        (
            "llama",
            {"attention.temperature_scale": 0.1},
            r"key llama\.attention\.temperature_scale is not known here",
        ),
        ("llama", {"attention.causal": False}, r"llama\.attention\.causal is not True"),
        ("llama", {"attention.value_length": 16}, r"llama\.attention\.value_length is not 32"),
        ("llama", {"rope.dimension_count": 16}, r"llama\.rope\.dimension_count is not 32"),
        ("llama", {"rope.scaling.type": "longrope"}, r"llama\.rope\.scaling\.type is not none"),
        ("llama", {"rope.scaling.factor": 4.0}, r"llama\.rope\.scaling\.factor is not 1\.0"),
        ("llama", {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, "original_context_length"),
        ("llama", {**YARN_KEYS, "rope.scaling.yarn_ext_factor": 0.5}, "yarn_ext_factor is not 1"),
        ("llama", {"attention.head_count_kv": [2, 4, 2]}, "head_count_kv differs from layer to layer"),
        (
            "llama",
            {"attention.layer_norm_rms_epsilon": "small"},
            "layer_norm_rms_epsilon is no finite number",
        ),
        (
            "llama",
            {"attention.layer_norm_rms_epsilon": None},
            r"lacks llama\.attention\.layer_norm_rms_epsilon",
        ),
        ("llama", {"vocab_size": 319}, r"llama\.vocab_size is not 320"),
        ("llama", {"expert_used_count": 2}, "expert_used_count is not 0"),
        ("qwen3moe", {"expert_gating_func": 2}, "expert_gating_func is not 1"),
        ("gpt-oss", {"expert_gating_func": 2}, "expert_gating_func is not 3"),
        ("gpt-oss", {"expert_feed_forward_length": 64}, "expert_feed_forward_length is not 96"),
        ("deepseek2-lite", {"expert_gating_func": 4}, "expert_gating_func is not 1 or 2"),
        ("deepseek2-lite", {"expert_weights_norm": True}, "expert_weights_norm is not False"),
        ("deepseek2-lite", {"nextn_predict_layers": 1}, "nextn_predict_layers is not 0"),
        ("deepseek2-lite", {"rope.dimension_count": 48}, "keys have 48 dimensions, of which 48 rotate"),
        ("deepseek2-lite", {"attention.head_count_kv": 1}, "head_count_kv is not 4"),
        ("deepseek2-lite", {"expert_used_count": 5}, "a token takes 5 of 4 experts"),
        ("deepseek2-v3", {"expert_group_count": 3}, "2 of 8 experts, from 1 of 3 groups"),
        ("deepseek2-v3", {"attention.key_length": 192}, r"attention\.key_length is not 48"),
        ("deepseek2-v3", {"rope.scaling.yarn_attn_factor": 2.0}, r"yarn_attn_factor is not 1\.0"),
        (
            "deepseek2-v3",
            {"expert_gating_func": 1, "expert_weights_norm": False},
            "e_score_correction_bias, which",
        ),
        ("olmo2", {"attention.sliding_window": 8}, r"key olmo2\.attention\.sliding_window is not known here"),
        ("gemma3", {"attention.sliding_window_pattern": [True]}, "sliding_window_pattern"),
        ("glm4", {"rope.dimension_count": 2**32 - 2}, "4294967294 of the 32 dimensions of a head rotate"),
        ("glm4", {"rope.dimension_count": 15}, "15 of the 32 dimensions of a head rotate"),
        ("glm4", {"rope.dimension_count": 0}, r"rope\.dimension_count is no whole number from 1 on"),
        ("gemma2", {"attn_logit_softcapping": -20.0}, r"the attention of layer 0 has softcap -20\.0"),
        ("granite", {"attention.scale": -1.0}, r"the attention of layer 0 has scaling -1\.0"),
        ("granite", {"logit_scale": 0.0}, r"has logits_scaling 0\.0, which is no number above 0"),
        ("cohere2", {"attention.layer_norm_epsilon": -1.0}, r"has layer_norm_eps -1\.0, which is no"),
        ("qwen2-yarn", {"rope.scaling.factor": None}, r"scaled by YaRN, and has no rope\.scaling\.factor"),
        ("llama", {"rope.freq_base": 0.0}, r"has rope_theta 0\.0, which is no number above 0"),
    ],
)
def test_what_could_change_the_logits_unnoticed_is_refused_by_its_key(
    tmp_path: Path, name: str, keys: dict[str, Any], says: str
) -> None:
    case = CASES[name]
    path = write_gguf(tmp_path / "model.gguf", model_of(case), case.architecture, case.keys | keys)
    with pytest.raises(CheckpointError, match=says):
        served(path)


def test_files_that_do_not_say_how_experts_are_grouped_are_deepseek_s(tmp_path: Path) -> None:
    """Tolerance: 1e-3 absolute, in float32. A model of 160 experts has 8 groups, and a token takes from 3."""
    options = {
        **DEEPSEEK,
        "num_hidden_layers": 2,
        "n_routed_experts": 160,
        "num_experts_per_tok": 6,
        "n_group": 8,
        "topk_group": 3,
        "topk_method": "group_limited_greedy",
    }
    model = model_of(Case("deepseek2", "deepseek_v2", options))
    keys = {**LATENT_KEYS, "attention.q_lora_rank": 32}
    rows = rows_of(served(write_gguf(tmp_path / "model.gguf", model, "deepseek2", keys)), PROMPT)
    assert np.abs(rows - reference_logits(model, PROMPT)).max() <= 1e-3
    keys |= {"expert_group_count": 1, "expert_group_used_count": 1}
    others = rows_of(served(write_gguf(tmp_path / "one.gguf", model, "deepseek2", keys)), PROMPT)
    assert np.abs(rows - others).max() > 1e-2


def test_half_of_two_projections_is_refused(tmp_path: Path) -> None:
    case = CASES["deepseek2-lite"]
    extra = {"blk.0.attn_k_b.weight": np.ones((4, 32, 32), np.float32)}
    path = write_gguf(tmp_path / "model.gguf", model_of(case), case.architecture, case.keys, extra=extra)
    with pytest.raises(CheckpointError, match=r"attn_k_b\.weight has no other half of its shape"):
        served(path)


def test_equal_numbers_for_every_layer_are_one_number(tmp_path: Path) -> None:
    case, keys = CASES["llama"], {"attention.head_count_kv": [2, 2, 2], "feed_forward_length": [96] * 3}
    model = model_of(case)
    path = write_gguf(tmp_path / "model.gguf", model, "llama", keys)
    assert np.abs(rows_of(served(path), PROMPT) - reference_logits(model, PROMPT)).max() <= 1e-3


def test_a_tensor_that_the_architecture_lacks_is_refused_by_its_name(tmp_path: Path) -> None:
    model = model_of(CASES["qwen2"])
    for name, says in (
        ("blk.0.attn_sinks.weight", r"its tensor blk\.0\.attn_sinks\.weight is not known here"),
        ("blk.7.attn_norm.weight", r"its tensor blk\.7\.attn_norm\.weight is not known here"),
        (
            "blk.0.attn_q_norm.weight",
            r"blk\.0\.attn_q_norm\.weight would be .*Qwen2ForCausalLM does not have",
        ),
    ):
        extra = {name: np.ones(32, np.float32)}
        path = write_gguf(tmp_path / "model.gguf", model, "qwen2", {}, extra=extra)
        with pytest.raises(CheckpointError, match=says):
            served(path)


def test_a_tensor_of_another_shape_is_refused_by_its_name(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", model_of(CASES["llama"]), "llama", {"feed_forward_length": 64})
    with pytest.raises(CheckpointError, match=r"blk\.0\.ffn_\w+\.weight is \[.*96.*\], and by the metadata"):
        served(path)


def test_a_vocabulary_that_differs_from_the_embedding_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", model_of(CASES["llama"]), "llama", {}, num_tokens=319)
    with pytest.raises(CheckpointError, match=r"tokens has 319, and token_embd\.weight has 320 rows"):
        served(path)


def test_other_architectures_are_refused_by_name(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", model_of(CASES["llama"]), "llama", {})
    path.write_bytes(path.read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0mamba", 1))
    with pytest.raises(CheckpointError, match="architecture mamba is not among cohere2, command-r"):
        served(path)
