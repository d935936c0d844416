"""GGUF files of every architecture: served rows are those of the transformers model that the file was written from."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from block_models import Blocks, fill_with_blocks
from gguf_files import write_gguf
from logitengine.config import EngineConfig
from logitengine.errors import CheckpointError
from logitengine.model.checkpoint.resolve import resolve_checkpoint
from logitengine.model.gguf.config import CONFIGS
from logitengine.model.gguf.model import GgufModel
from logitengine.model.loader import LoadedModel, load, prepare
from logitengine.run.devices import choose_device
from logitkernels.backend import load_kernels
from support import EVERY_ROW, greedy, make_engine, reference_logits, run
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

VOCAB = 320
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
PROMPT = list(range(60, 108))

SLIDING = {"sliding_window": 8}


@dataclass(frozen=True)
class Case:
    """A config of transformers, and what llama.cpp's conversion writes of it beside the common keys."""

    architecture: str
    model_type: str
    options: dict[str, Any] = field(default_factory=dict)
    keys: dict[str, Any] = field(default_factory=dict)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
YARN_KEYS = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 64,
}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
LINEAR_KEYS = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
GEMMA3_TYPES = ["sliding_attention", "sliding_attention", "full_attention"]

DEEPSEEK: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "head_dim": None,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
LATENT_KEYS: dict[str, Any] = {
    "attention.kv_lora_rank": 32,
    "attention.key_length": 48,
    "attention.value_length": 32,
    "rope.dimension_count": 16,
    "leading_dense_block_count": 1,
    "expert_shared_count": 2,
}
SPLIT_LATENT_KEYS = LATENT_KEYS | {
    "attention.head_count_kv": 1,
    "attention.key_length": 48,
    "attention.key_length_mla": 48,
    "attention.value_length_mla": 32,
}
GROUPS = {"n_group": 2, "topk_group": 1}
GROUP_KEYS = {"expert_group_count": 2, "expert_group_used_count": 1}

CASES = {
    "llama": Case("llama", "llama", {}, {"vocab_size": VOCAB}),
    "llama-tied": Case("llama", "llama", {"tie_word_embeddings": True}),
    "llama-biases": Case("llama", "llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-linear": Case("llama", "llama", {"rope_parameters": LINEAR}, LINEAR_KEYS),
    "llama-old-linear": Case("llama", "llama", {"rope_parameters": LINEAR}, {"rope.scale_linear": 4.0}),
    "mixtral": Case(
        "llama",
        "mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "mistral": Case("llama", "mistral", {"sliding_window": None}),
    "granite": Case(
        "granite",
        "granite",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.1,
            "logits_scaling": 2.0,
        },
        {"embedding_scale": 3.0, "residual_scale": 0.5, "attention.scale": 0.1, "logit_scale": 2.0},
    ),
    "smollm3": Case(
        "smollm3", "smollm3", {"num_hidden_layers": 5, "use_sliding_window": False, "layer_types": None}
    ),
    "qwen2": Case("qwen2", "qwen2"),
    "qwen2-yarn": Case("qwen2", "qwen2", {"rope_parameters": YARN}, YARN_KEYS),
    "qwen2-yarn-betas": Case(
        "qwen2",
        "qwen2",
        {"rope_parameters": {**YARN, "beta_fast": 16.0, "beta_slow": 2.0}},
        {**YARN_KEYS, "rope.scaling.yarn_beta_fast": 16.0, "rope.scaling.yarn_beta_slow": 2.0},
    ),
    "qwen3": Case("qwen3", "qwen3"),
    "qwen3moe": Case(
        "qwen3moe",
        "qwen3_moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True},
    ),
    "gemma": Case("gemma", "gemma"),
    "gemma2": Case(
        "gemma2",
        "gemma2",
        {
            **SLIDING,
            "query_pre_attn_scalar": 32,
            "attn_logit_softcapping": 20.0,
            "final_logit_softcapping": 10.0,
        },
        {"attention.sliding_window": 8, "attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0},
    ),
    "gemma2-default-caps": Case(
        "gemma2", "gemma2", {**SLIDING, "query_pre_attn_scalar": 32}, {"attention.sliding_window": 8}
    ),
    "gemma3": Case(
        "gemma3",
        "gemma3_text",
        {
            **SLIDING,
            "query_pre_attn_scalar": 32,
            "layer_types": GEMMA3_TYPES,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
        {
            "attention.sliding_window": 8,
            "attention.sliding_window_pattern": [True, True, False],
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        },
    ),
    "gemma3-six": Case(
        "gemma3",
        "gemma3_text",
        {**SLIDING, "query_pre_attn_scalar": 32, "num_hidden_layers": 7, "layer_types": None},
        {"attention.sliding_window": 8, "mm.tokens_per_image": 256},
    ),
    "phi3": Case("phi3", "phi3", {**SLIDING, "head_dim": 16}, {"attention.sliding_window": 8}),
    "phi3-partial": Case(
        "phi3",
        "phi3",
        {
            "head_dim": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
        {"rope.dimension_count": 8},
    ),
    "olmo2": Case("olmo2", "olmo2", {"head_dim": 16}),
    "command-r": Case(
        "command-r",
        "cohere",
        {"head_dim": 16, "logit_scale": 0.5, "layer_norm_eps": 1e-5},
        {"attention.layer_norm_epsilon": 1e-5, "logit_scale": 0.5},
    ),
    "command-r-plus": Case(
        "command-r",
        "cohere",
        {"head_dim": 16, "logit_scale": 0.5, "layer_norm_eps": 1e-5, "use_qk_norm": True},
        {"attention.layer_norm_epsilon": 1e-5, "logit_scale": 0.5},
    ),
    "cohere2": Case(
        "cohere2",
        "cohere2",
        {**SLIDING, "num_hidden_layers": 5, "logit_scale": 0.5, "layer_norm_eps": 1e-5},
        {"attention.sliding_window": 8, "attention.layer_norm_epsilon": 1e-5, "logit_scale": 0.5},
    ),
    "glm4": Case(
        "glm4",
        "glm4",
        {
            "attention_bias": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
        {"rope.dimension_count": 16},
    ),
    "ernie4_5": Case("ernie4_5", "ernie4_5"),
    "gpt-oss": Case(
        "gpt-oss",
        "gpt_oss",
        {
            **SLIDING,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {**YARN, "truncate": False},
        },
        {**YARN_KEYS, "attention.sliding_window": 8},
    ),
    "deepseek2-lite": Case("deepseek2", "deepseek_v2", {**DEEPSEEK, "q_lora_rank": None}, LATENT_KEYS),
    "deepseek2-v2": Case(
        "deepseek2",
        "deepseek_v2",
        {
            **DEEPSEEK,
            **GROUPS,
            "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 16.0,
            "rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        },
        {
            **LATENT_KEYS,
            **GROUP_KEYS,
            **YARN_KEYS,
            "attention.q_lora_rank": 32,
            "expert_gating_func": 1,
            "expert_weights_scale": 16.0,
            "rope.scaling.yarn_log_multiplier": 0.0707,
        },
    ),
    "deepseek2-v3": Case(
        "deepseek2",
        "deepseek_v3",
        {
            **DEEPSEEK,
            **GROUPS,
            "n_routed_experts": 8,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
        {
            **SPLIT_LATENT_KEYS,
            **GROUP_KEYS,
            **YARN_KEYS,
            "attention.q_lora_rank": 32,
            "expert_gating_func": 2,
            "expert_weights_scale": 2.5,
            "expert_weights_norm": True,
            "rope.scaling.yarn_log_multiplier": 0.1,
        },
    ),
    "deepseek2-moonlight": Case(
        "deepseek2",
        "deepseek_v3",
        {**DEEPSEEK, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.446},
        {**SPLIT_LATENT_KEYS, "expert_weights_scale": 2.446, "expert_weights_norm": True},
    ),
    "deepseek2-dense": Case(
        "deepseek2",
        "deepseek_v2",
        {**DEEPSEEK, "first_k_dense_replace": 3, "q_lora_rank": None},
        {
            **SPLIT_LATENT_KEYS,
            "leading_dense_block_count": 3,
            "expert_shared_count": 0,
            "expert_count": None,
            "expert_used_count": None,
        },
    ),
}

FUSED = {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"}
AS_THEY_ARE = [name for name, case in CASES.items() if case.model_type not in FUSED]
"""Cases of architectures that run through transformers' modules."""


def model_of(case: Case, **sizes: Any) -> PreTrainedModel:
    """Return a random model whose norms and biases differ from what a model is initialised with.

    ``sizes`` are members of its config in place of the case's.
    """
    torch.manual_seed(3)
    options = SIZES | case.options | sizes
    options = {name: value for name, value in options.items() if value is not None or name == "q_lora_rank"}
    config = CONFIG_MAPPING[case.model_type](**options)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, mean=0.7, std=0.2)
        elif name.endswith(("bias", "sinks")):
            torch.nn.init.normal_(parameter, std=0.2)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            torch.nn.init.normal_(buffer, std=0.2)
    return model


def serve(path: Path, **options: Any) -> LoadedModel:
    config = {"model": str(path), "dtype": "float32", "kv_cache_bytes": 1 << 24, "num_threads": 1, **options}
    return load(EngineConfig.model_validate(config))


def rows_of(loaded: LoadedModel) -> np.ndarray[Any, Any]:
    return run(make_engine(loaded), [greedy("a", PROMPT, 0, EVERY_ROW)])["a", 0].prompt_rows


def test_every_architecture_has_a_case() -> None:
    assert {case.architecture for case in CASES.values()} == set(CONFIGS)


@pytest.mark.parametrize("name", CASES)
def test_rows_are_those_of_the_model_that_the_file_was_written_from(name: str, tmp_path: Path) -> None:
    """Tolerance in float32: 1e-3 absolute, 1e-4 mean, of logits with a standard deviation of at least 0.3."""
    case = CASES[name]
    model = model_of(case)
    path = write_gguf(tmp_path / "model.gguf", model, case.architecture, case.keys)
    expected = reference_logits(model, PROMPT)
    error = np.abs(rows_of(serve(path)) - expected)
    assert expected.std() >= 0.3
    assert error.max() <= 1e-3
    assert error.mean() <= 1e-4


def kind_of(name: str, columns: int) -> str:
    """Return the format of a tensor as in files of Q4_K_M; routers and norms are never in blocks."""
    if "gate_inp" in name or "_norm" in name:
        return "F32"
    if columns % 256:
        return "Q8_0"
    return "Q6_K" if name in {"output.weight", "token_embd.weight"} or "attn_v" in name else "Q4_K"


def in_place(path: Path, **options: Any) -> tuple[LoadedModel, PreTrainedModel]:
    """Serve a file, and return what is left of transformers' model too."""
    config = EngineConfig.model_validate(
        {"model": str(path), "dtype": "float32", "kv_cache_bytes": 1 << 24, "num_threads": 1, **options}
    )
    checkpoint, device = resolve_checkpoint(str(path)), choose_device("cpu")
    gguf = GgufModel(path, torch.float32, device.torch_device)
    kernels = load_kernels("auto", "cpu")
    weights = gguf.weights(kernels.block_formats)
    return prepare(config, checkpoint, gguf.skeleton, kernels, device, weights, stored=gguf), gguf.skeleton


def block_file(case: Case, directory: Path) -> tuple[PreTrainedModel, Path, Blocks]:
    """Write a file of blocks, and return the model that has their weights, the file, and the blocks by tensor."""
    heads = 256 // (case.options.get("head_dim", 32) or 32)
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": heads}
    if "moe_intermediate_size" in case.options:
        sizes["moe_intermediate_size"] = 256
    if case.architecture == "deepseek2":
        sizes["num_key_value_heads"] = heads
    model = model_of(case, **sizes)
    expert_kind = "MXFP4" if case.architecture == "gpt-oss" else "Q4_K"

    def kind(tensor: str, columns: int) -> str:
        return expert_kind if "_exps" in tensor else kind_of(tensor, columns)

    blocks = fill_with_blocks(model, case.architecture, case.keys, kind)
    path = write_gguf(directory / "model.gguf", model, case.architecture, case.keys, blocks=blocks)
    return model, path, blocks


@pytest.mark.parametrize("name", AS_THEY_ARE)
def test_models_that_are_not_fused_multiply_the_file_s_blocks(name: str, tmp_path: Path) -> None:
    """Tolerance in float32: 1e-3 absolute, of logits with a standard deviation of at least 0.3.

    Of matrices only routers are left in transformers' modules.
    """
    model, path, blocks = block_file(CASES[name], tmp_path)
    loaded, left = in_place(path)
    expected = reference_logits(model, PROMPT)
    assert expected.std() >= 0.3
    assert np.abs(rows_of(loaded) - expected).max() <= 1e-3
    apart = ("token_embd.weight", "attn_k_b.weight", "attn_v_b.weight")
    multiplied = {own for tensor, (own, _) in blocks.items() if not tensor.endswith(apart)}
    # The projections from the latent, one of which a file has transposed.
    dense = ", dense" if "attention.key_length_mla" in CASES[name].keys else ""
    assert loaded.info.weights == f"stored ({', '.join(sorted(multiplied))})" + dense
    matrices = [name for name, parameter in left.named_parameters() if parameter.ndim > 1]
    routers = ("mlp.gate.weight", "mlp.router.weight", "norm.weight")
    assert all(name.endswith(routers) for name in matrices)


def test_experts_in_several_formats_and_in_none_are_served(tmp_path: Path) -> None:
    """Tolerance in float32: 1e-3 absolute. Gates are in one format, ups in another, and downs are no blocks."""
    case, kinds = CASES["qwen3moe"], {"ffn_up_exps": "Q4_0", "ffn_down_exps": "F32", "ffn_gate_inp": "F32"}
    model = model_of(case)

    def kind(tensor: str, columns: int) -> str:
        return next(
            (own for part, own in kinds.items() if part in tensor), "Q8_0" if columns % 32 == 0 else "F32"
        )

    blocks = fill_with_blocks(model, case.architecture, case.keys, kind)
    path = write_gguf(tmp_path / "model.gguf", model, case.architecture, case.keys, blocks=blocks)
    loaded = serve(path)
    assert np.abs(rows_of(loaded) - reference_logits(model, PROMPT)).max() <= 1e-3
    assert loaded.info.weights.endswith("Q8_0), dense")


@pytest.mark.parametrize("name", ["granite", "gpt-oss", "deepseek2-v3"])
def test_models_that_are_not_fused_are_nearer_to_float32_than_transformers_bfloat16(
    name: str, tmp_path: Path
) -> None:
    """Bound: 0.6 of the mean absolute error of transformers' bfloat16."""
    model, path, _ = block_file(CASES[name], tmp_path)
    expected = reference_logits(model, PROMPT)
    theirs = torch.nn.Module.to(copy.deepcopy(model), torch.bfloat16)
    their_error = np.abs(reference_logits(theirs, PROMPT) - expected).mean()
    assert np.abs(rows_of(serve(path, dtype="auto")) - expected).mean() <= 0.6 * their_error


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
    assert np.abs(rows_of(serve(path)) - expected).max() <= 1e-3
    without = rows_of(serve(write_gguf(tmp_path / "plain.gguf", model, "llama", {})))
    assert np.abs(without - expected).max() > 1e-2


@pytest.mark.parametrize("factors", [np.ones(15), np.zeros(16), np.full(16, np.nan)])
def test_factors_that_no_frequency_can_have_are_refused(
    tmp_path: Path, factors: np.ndarray[Any, Any]
) -> None:
    extra = {"rope_freqs.weight": factors.astype(np.float32)}
    path = write_gguf(tmp_path / "model.gguf", model_of(CASES["llama"]), "llama", {}, extra=extra)
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight is not 16 numbers above 0"):
        serve(path)


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
        ("glm4", {"rope.dimension_count": 65536}, "its layers compute no token"),
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
        serve(path)


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
    rows = rows_of(serve(write_gguf(tmp_path / "model.gguf", model, "deepseek2", keys)))
    assert np.abs(rows - reference_logits(model, PROMPT)).max() <= 1e-3
    keys |= {"expert_group_count": 1, "expert_group_used_count": 1}
    others = rows_of(serve(write_gguf(tmp_path / "one.gguf", model, "deepseek2", keys)))
    assert np.abs(rows - others).max() > 1e-2


def test_half_of_two_projections_is_refused(tmp_path: Path) -> None:
    case = CASES["deepseek2-lite"]
    extra = {"blk.0.attn_k_b.weight": np.ones((4, 32, 32), np.float32)}
    path = write_gguf(tmp_path / "model.gguf", model_of(case), case.architecture, case.keys, extra=extra)
    with pytest.raises(CheckpointError, match=r"attn_k_b\.weight has no other half of its shape"):
        serve(path)


def test_equal_numbers_for_every_layer_are_one_number(tmp_path: Path) -> None:
    case, keys = CASES["llama"], {"attention.head_count_kv": [2, 2, 2], "feed_forward_length": [96] * 3}
    model = model_of(case)
    path = write_gguf(tmp_path / "model.gguf", model, "llama", keys)
    assert np.abs(rows_of(serve(path)) - reference_logits(model, PROMPT)).max() <= 1e-3


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
            serve(path)


def test_a_tensor_of_another_shape_is_refused_by_its_name(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", model_of(CASES["llama"]), "llama", {"feed_forward_length": 64})
    with pytest.raises(CheckpointError, match=r"blk\.0\.ffn_\w+\.weight is \[.*96.*\], and by the metadata"):
        serve(path)


def test_a_vocabulary_that_differs_from_the_embedding_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", model_of(CASES["llama"]), "llama", {}, num_tokens=319)
    with pytest.raises(CheckpointError, match=r"tokens has 319, and token_embd\.weight has 320 rows"):
        serve(path)


def test_other_architectures_are_refused_by_name(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", model_of(CASES["llama"]), "llama", {})
    path.write_bytes(path.read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0mamba", 1))
    with pytest.raises(CheckpointError, match="architecture mamba is not among cohere2, command-r"):
        serve(path)
