"""AWQ, GPTQ and compressed-tensors checkpoints: served as they are."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from logitengine.errors import CheckpointError
from logitengine.model.checkpoint.files import check_directory
from logitengine.model.checkpoint.resolve import resolve_checkpoint
from logitengine.model.int4.config import int4_config
from logitengine.model.int4.model import Int4Model
from logitkernels import BlockWeight
from packed_checkpoints import Packing, edit_tensors, in_float16, save_packed, tiny_llama
from random_blocks import dequantized
from support import reference_logits, rows_of, served
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

CPU = torch.device("cpu")
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)
PROMPT = list(range(60, 92))
FORMATS = frozenset({"INT4_32", "INT4_64", "INT4_128"})

PACKINGS = [
    Packing("awq"),
    Packing("awq", 128),
    Packing("gptq"),
    Packing("gptq", 128, has_zeros=False),
    Packing("gptq", -1, checkpoint_format="gptq_v2"),
    Packing("compressed-tensors", 32, has_zeros=False, dtype=torch.bfloat16),
    Packing("compressed-tensors", 64, dtype=torch.float32),
    Packing("compressed-tensors", 128),
    Packing("compressed-tensors", -1, has_zeros=False),
]
ORDERED = [Packing("gptq", is_ordered=True), Packing("compressed-tensors", is_ordered=True)]


def stored(directory: Path) -> Int4Model:
    files = check_directory(directory)
    assert files is not None
    return Int4Model(directory, files, torch.float32, CPU)


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_blocks_are_the_checkpoints_weights(tmp_path: Path, packing: Packing) -> None:
    """To the bit in float64, in the widest groups that there are."""
    _, weights = save_packed(tmp_path, packing)
    source = stored(tmp_path).weights(FORMATS)
    for name, expected in weights.items():
        weight = source.get(name)
        assert isinstance(weight, BlockWeight)
        assert weight.format == f"INT4_{packing.group_size if packing.group_size > 0 else 128}"
        assert weight.shape == tuple(expected.shape)
        assert torch.equal(dequantized(weight.format, weight.raw), expected)


@pytest.mark.parametrize("packing", [*PACKINGS, *ORDERED], ids=str)
def test_dense_weights_are_the_checkpoints(tmp_path: Path, packing: Packing) -> None:
    """Rounded to float32 once: a scale of float16 times an integer has fewer bits."""
    _, weights = save_packed(tmp_path, packing)
    source = stored(tmp_path).weights()
    for name, expected in weights.items():
        assert torch.equal(source.dense(name), expected.float())


@pytest.mark.parametrize("packing", [PACKINGS[1], PACKINGS[2], PACKINGS[6], PACKINGS[8]], ids=str)
def test_rows_are_those_of_the_packed_weights(tmp_path: Path, packing: Packing) -> None:
    """Reference: transformers in float32. Tolerance: 1e-3 absolute."""
    model, _ = save_packed(tmp_path, packing)
    loaded = served(tmp_path)
    assert np.abs(rows_of(loaded, PROMPT) - reference_logits(model, PROMPT)).max() <= 1e-3
    size = packing.group_size if packing.group_size > 0 else 128
    assert loaded.info.weights == f"stored (INT4_{size}), dense"


@pytest.mark.parametrize(
    ("packing", "options", "form"),
    [
        (Packing("awq"), {"kernels": "reference"}, "awq"),
        (Packing("compressed-tensors"), {"weights": "dense"}, "compressed-tensors"),
        (ORDERED[0], {}, "gptq with columns in the order of activations"),
        (ORDERED[1], {}, "compressed-tensors with columns in the order of activations"),
    ],
)
def test_what_is_not_multiplied_is_dequantised_and_said_so_once(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    packing: Packing,
    options: dict[str, str],
    form: str,
) -> None:
    """Reference: transformers in float32. Tolerance: 1e-3 absolute."""
    model, _ = save_packed(tmp_path, packing)
    with caplog.at_level(logging.INFO):
        loaded = served(tmp_path, **options)
    assert caplog.messages.count(f"weights in {form} are dequantised to float32") == 1
    assert loaded.info.weights == "dense"
    assert np.abs(rows_of(loaded, PROMPT) - reference_logits(model, PROMPT)).max() <= 1e-3


def test_an_architecture_that_is_not_fused_is_multiplied_packed(tmp_path: Path) -> None:
    """Reference: transformers in float32. Tolerance: 1e-3 absolute."""
    sizes = {name: getattr(tiny_llama().config, name) for name in SIZES}
    torch.manual_seed(0)
    cohere = CohereForCausalLM(CohereConfig(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2))
    model, _ = save_packed(tmp_path, Packing("gptq"), in_float16(cohere.eval()))
    loaded = served(tmp_path)
    assert loaded.info.weights.startswith("stored (INT4_")
    assert np.abs(rows_of(loaded, PROMPT) - reference_logits(model, PROMPT)).max() <= 1e-3


def tiny_experts() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {name: getattr(tiny_llama().config, name) for name in SIZES}
    config = Qwen3MoeConfig(
        **sizes,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    )
    return in_float16(Qwen3MoeForCausalLM(config).eval())


@pytest.mark.parametrize(
    ("packing", "options", "form"),
    [
        (Packing("awq"), {}, "stored (INT4_32), dense"),
        (Packing("compressed-tensors"), {"weights": "dense"}, "dense"),
        (Packing("gptq"), {"kernels": "reference"}, "dense"),
        (ORDERED[0], {}, "dense"),
    ],
)
def test_packed_experts_are_served(
    tmp_path: Path, packing: Packing, options: dict[str, str], form: str
) -> None:
    """Reference: transformers in float32. Tolerance: 1e-3 absolute."""
    model, _ = save_packed(tmp_path, packing, tiny_experts())
    check_directory(tmp_path)
    loaded = served(tmp_path, **options)
    assert loaded.info.weights == form
    assert np.abs(rows_of(loaded, PROMPT) - reference_logits(model, PROMPT)).max() <= 1e-3


@pytest.mark.parametrize("packing", [Packing("gptq"), Packing("compressed-tensors")], ids=str)
def test_a_layer_of_one_row_is_served(tmp_path: Path, packing: Packing) -> None:
    """The gate of Qwen2-MoE's shared expert. Reference: transformers in float32. Tolerance: 1e-3 absolute."""
    torch.manual_seed(0)
    sizes = {name: getattr(tiny_llama().config, name) for name in SIZES}
    config = Qwen2MoeConfig(
        **sizes,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        initializer_range=0.2,
    )
    model, weights = save_packed(tmp_path, packing, in_float16(Qwen2MoeForCausalLM(config).eval()))
    assert weights["model.layers.0.mlp.shared_expert_gate.weight"].shape == (1, 128)
    assert np.abs(rows_of(served(tmp_path), PROMPT) - reference_logits(model, PROMPT)).max() <= 1e-3


def test_a_packed_expert_that_is_missing_or_too_many_is_refused_by_name(tmp_path: Path) -> None:
    save_packed(tmp_path, Packing("awq"), tiny_experts())
    name = "model.layers.1.mlp.experts"
    own = (tmp_path / "config.json").read_text()
    many = json.dumps(json.loads(own) | {"num_local_experts": 10**9})
    (tmp_path / "config.json").write_text(many)
    with pytest.raises(CheckpointError, match="has not all 1000000000 experts"):
        served(tmp_path)
    (tmp_path / "config.json").write_text(own)
    edit_tensors(
        tmp_path, lambda tensors: {own: t for own, t in tensors.items() if f"{name}.3.up" not in own}
    )
    with pytest.raises(CheckpointError, match=f"it has no tensor for {name}.3.up_proj.weight"):
        served(tmp_path)
    save_packed(tmp_path, Packing("awq"), tiny_experts())
    edit_tensors(
        tmp_path,
        lambda tensors: (
            tensors
            | {
                own.replace("experts.3", "experts.4"): t.clone()
                for own, t in tensors.items()
                if f"{name}.3" in own
            }
        ),
    )
    with pytest.raises(CheckpointError, match=rf"{name}\.4\..* which Qwen3MoeForCausalLM does not have"):
        served(tmp_path)


def test_a_tied_head_and_a_packed_head_and_biases_are_served(tmp_path: Path) -> None:
    """Reference: transformers in float32. Tolerance: 1e-3 absolute."""
    for name, options, skipped in (
        ("tied", {"tie_word_embeddings": True, "attention_bias": True}, ("lm_head",)),
        ("packed", {}, ("model.layers.0.mlp.down_proj",)),
    ):
        directory = tmp_path / name
        directory.mkdir()
        model = tiny_llama(**options)
        for parameter, numbers in model.named_parameters():
            if parameter.endswith("bias"):
                numbers.data = torch.randn(numbers.shape).half().float()
        save_packed(directory, Packing("gptq", skipped=skipped), model)
        loaded = served(directory)
        assert loaded.info.weights == "stored (INT4_32), dense"
        assert np.abs(rows_of(loaded, PROMPT) - reference_logits(model, PROMPT)).max() <= 1e-3


def test_a_model_in_several_files_is_served(tmp_path: Path) -> None:
    """Reference: transformers in float32. Tolerance: 1e-3 absolute."""
    model, _ = save_packed(tmp_path, Packing("awq"), num_files=3)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    check_directory(tmp_path)
    assert np.abs(rows_of(served(tmp_path), PROMPT) - reference_logits(model, PROMPT)).max() <= 1e-3


def test_headers_and_index_are_read_once(tmp_path: Path) -> None:
    model, _ = save_packed(tmp_path, Packing("awq"), num_files=3)
    checkpoint = resolve_checkpoint(str(tmp_path))
    (tmp_path / "model.safetensors.index.json").unlink()
    for path in tmp_path.glob("*.safetensors"):
        content = path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        path.write_bytes(bytes(start) + content[start:])
    loaded = served(tmp_path, checkpoint)
    assert np.abs(rows_of(loaded, PROMPT) - reference_logits(model, PROMPT)).max() <= 1e-3


def test_tensors_that_are_not_aligned_are_read(tmp_path: Path) -> None:
    _, weights = save_packed(tmp_path, Packing("gptq"))
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    path.write_bytes((start - 7).to_bytes(8, "little") + content[8:start] + b" " + content[start:])
    source = stored(tmp_path).weights()
    for name, expected in weights.items():
        assert torch.equal(source.dense(name), expected.float())


def test_a_skeleton_holds_no_matrix(tmp_path: Path) -> None:
    save_packed(tmp_path, Packing("awq"))
    model = stored(tmp_path)
    model.fill_small(torch.float32)
    held = {name for name, tensor in model.skeleton.named_parameters() if tensor.device == CPU}
    assert held
    assert all("norm" in name for name in held)


def test_biases_of_zero_that_the_model_does_not_have_are_ignored_and_others_refused(tmp_path: Path) -> None:
    save_packed(tmp_path, Packing("gptq"))
    name = "model.layers.0.mlp.up_proj.bias"
    edit_tensors(tmp_path, lambda tensors: tensors | {name: torch.zeros(256)})
    assert stored(tmp_path).skeleton.get_submodule("model.layers.0.mlp.up_proj").bias is None
    edit_tensors(tmp_path, lambda tensors: tensors | {name: torch.ones(256)})
    with pytest.raises(CheckpointError, match="bias, which LlamaForCausalLM does not have"):
        stored(tmp_path)


def test_generation_config_ends_sequences(tmp_path: Path) -> None:
    save_packed(tmp_path, Packing("awq"))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert served(tmp_path).info.eos_token_ids == [2, 7]


@pytest.mark.parametrize("place", [("compression_config",), ("text_config", "quantization_config")])
def test_other_places_of_the_quantization_config_are_read(tmp_path: Path, place: tuple[str, ...]) -> None:
    _, weights = save_packed(tmp_path, Packing("compressed-tensors"))
    fields = json.loads((tmp_path / "config.json").read_text())
    moved: Any = fields.pop("quantization_config")
    for key in reversed(place):
        moved = {key: moved}
    if place == ("compression_config",):
        (tmp_path / "config.json").write_text(json.dumps(fields | moved))
        name = "model.layers.1.mlp.down_proj.weight"
        assert torch.equal(stored(tmp_path).weights().dense(name), weights[name].float())
    with pytest.raises(CheckpointError, match="quantised by fp8"):
        int4_config(json.loads(json.dumps(fields | moved).replace("compressed-tensors", "fp8")), "model")


MIXTRALS_PARTS = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def tiny_mixtral() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {name: getattr(tiny_llama().config, name) for name in SIZES}
    config = MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2, initializer_range=0.2)
    return in_float16(MixtralForCausalLM(config).eval())


def mixtrals_name(name: str) -> str:
    """Return the name of a tensor in Mixtral's own checkpoints, which AutoAWQ and AutoGPTQ keep."""
    name = name.replace(".mlp.", ".block_sparse_moe.")
    return re.sub(r"(experts\.\d+)\.(\w+)", lambda match: f"{match[1]}.{MIXTRALS_PARTS[match[2]]}", name)


@pytest.mark.parametrize(
    ("packing", "rename"),
    [
        (Packing("gptq"), lambda name: name),  # GPTQModel's
        (
            Packing("compressed-tensors"),
            lambda name: name.replace(".mlp.", ".block_sparse_moe."),
        ),  # llm-compressor's
        (Packing("awq"), mixtrals_name),
    ],
)
def test_packed_experts_under_any_of_mixtrals_names_are_served(
    tmp_path: Path, packing: Packing, rename: Any
) -> None:
    """Reference: transformers in float32. Tolerance: 1e-3 absolute."""
    model, _ = save_packed(tmp_path, packing, tiny_mixtral())
    edit_tensors(tmp_path, lambda tensors: {rename(name): tensor for name, tensor in tensors.items()})
    check_directory(tmp_path)
    loaded = served(tmp_path)
    assert loaded.info.weights == "stored (INT4_32), dense"
    assert np.abs(rows_of(loaded, PROMPT) - reference_logits(model, PROMPT)).max() <= 1e-3


def test_biases_of_zero_are_ignored_under_mixtrals_names_too(tmp_path: Path) -> None:
    """AutoGPTQ writes them."""
    save_packed(tmp_path, Packing("gptq"), tiny_mixtral())
    name = "model.layers.0.mlp.experts.0.up_proj.bias"
    edit_tensors(
        tmp_path,
        lambda tensors: {mixtrals_name(own): t for own, t in (tensors | {name: torch.zeros(256)}).items()},
    )
    stored(tmp_path)


def test_a_parameter_that_is_there_under_two_names_is_refused(tmp_path: Path) -> None:
    save_packed(tmp_path, Packing("awq"), tiny_mixtral())
    name = "model.layers.0.mlp.gate.weight"
    edit_tensors(tmp_path, lambda tensors: tensors | {mixtrals_name(name): tensors[name].clone()})
    with pytest.raises(CheckpointError, match=f"are both {name}"):
        stored(tmp_path)
