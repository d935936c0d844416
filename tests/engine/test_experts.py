"""Experts as packed layers: transformers' results on the rounded weights, row by row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from logitengine.config import EngineConfig
from logitengine.errors import CheckpointError
from logitengine.model.loader import LoadedModel, load
from logitengine.model.network.experts import ClampedGate, Gate, PackedExperts
from logitkernels import DenseWeight, Kernels
from logitkernels.backend import load_kernels
from support import EVERY_ROW, greedy, make_engine, reference_logits, run
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

PROMPT = list(range(60, 92))
SIZES: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "gpt_oss": {"sliding_window": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 32,
        "v_head_dim": 32,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
    },
    "phi3": {},
}


def save(directory: Path, tokenizer: Path, model_type: str, **options: Any) -> PreTrainedModel:
    torch.manual_seed(7)
    config = CONFIG_MAPPING[model_type](**{**SIZES, **options})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "sinks")):
            nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(directory)
    (directory / "tokenizer.json").write_bytes((tokenizer / "tokenizer.json").read_bytes())
    return model


def served(directory: Path, **options: Any) -> LoadedModel:
    config = {
        "model": str(directory),
        "weights": "int8",
        "kv_cache_bytes": 1 << 24,
        "num_threads": 1,
        **options,
    }
    return load(EngineConfig.model_validate(config))


def round_to_int8(model: PreTrainedModel) -> None:
    """Round the linear layers and the experts, along the features that are summed."""
    linears = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    for parameter in model.parameters():
        is_transposed = parameter.ndim == 3 and model.config.model_type == "gpt_oss"
        if parameter.ndim == 3 or id(parameter) in linears:
            matrices = parameter.data.mT if is_transposed else parameter.data
            rows = matrices.reshape(-1, matrices.shape[-1]).contiguous().numpy()
            rounded = dequantize(quantize(rows, GGMLQuantizationType.Q8_0), GGMLQuantizationType.Q8_0)
            matrices.copy_(torch.from_numpy(rounded).view(matrices.shape))


@pytest.mark.parametrize("model_type", MODELS)
def test_int8_rounds_linear_layers_and_experts_of_models_that_are_not_fused(
    tmp_path: Path, tiny_llama: Path, model_type: str
) -> None:
    """Tolerance: 1e-3 absolute, in float32, where rounding alone changes the rows by more than 1e-2."""
    model = save(tmp_path, tiny_llama, model_type, **MODELS[model_type])
    loaded = served(tmp_path, dtype="float32")
    assert loaded.info.weights == "int8 (Q8_0)"
    rows = run(make_engine(loaded), [greedy("a", PROMPT, 0, EVERY_ROW)])["a", 0].prompt_rows
    assert np.abs(rows - reference_logits(model, PROMPT)).max() > 1e-2
    round_to_int8(model)
    with torch.inference_mode():
        expected = model(torch.tensor([PROMPT]), use_cache=False).logits[0].numpy()
    assert np.abs(rows - expected).max() <= 1e-3


def test_experts_of_an_unknown_kind_are_refused(tmp_path: Path, tiny_llama: Path) -> None:
    save(tmp_path, tiny_llama, "mixtral", hidden_act="relu")
    with pytest.raises(
        CheckpointError, match="MixtralExperts are experts of a kind whose weights are not packed"
    ):
        served(tmp_path)


@pytest.fixture(scope="module")
def native() -> Kernels:
    return load_kernels("cpu", "cpu")


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_a_row_is_the_same_in_any_company(native: Kernels, data: st.DataObject) -> None:
    """To the bit: alone, among others and in another order, however its experts are ordered."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    layers = [
        (
            native.pack([DenseWeight("gate_up", draw(28, 24))], exact=True),
            native.pack([DenseWeight("down", draw(24, 14))], exact=True),
        )
        for _ in range(5)
    ]
    gates: list[Gate] = [native.silu_and_mul, ClampedGate(native, 1.702, 7.0)]
    gate = data.draw(st.sampled_from(gates))
    experts = PackedExperts(layers, gate)
    rows = data.draw(st.integers(1, 20))
    hidden, weights = draw(rows, 24), draw(rows, 3).abs()
    indices = torch.stack([torch.randperm(5, generator=generator)[:3] for _ in range(rows)])
    together = experts(hidden, indices, weights)
    chosen = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, unique=True))
    order = torch.tensor(data.draw(st.permutations(range(3))))
    apart = experts(hidden[chosen], indices[chosen][:, order], weights[chosen][:, order])
    assert torch.equal(apart, together[chosen])


def test_the_clamped_gate_is_gpt_oss_s(native: Kernels) -> None:
    """Tolerance: 1e-5 relative to float64, of numbers on both sides of the limit."""
    gate_up = torch.linspace(-20, 20, 400).view(4, 100)[:, torch.randperm(100)]
    gate, up = gate_up.double().chunk(2, dim=-1)
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    expected = (up + 1) * gate * torch.sigmoid(1.702 * gate)
    found = ClampedGate(native, 1.702, 7.0)(gate_up).double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
