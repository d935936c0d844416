"""AWQ, GPTQ and compressed-tensors checkpoints: served as they are, or refused by name."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from logitengine.config import EngineConfig
from logitengine.errors import CheckpointError
from logitengine.model.checkpoint.files import check_directory
from logitengine.model.int4.config import int4_config
from logitengine.model.int4.model import Int4Model
from logitengine.model.loader import LoadedModel, load
from logitkernels import BlockWeight
from packed_checkpoints import Packing, in_float16, quantization_config, save_packed, tiny_llama
from random_blocks import dequantized
from safetensors.torch import load_file, save_file
from support import EVERY_ROW, greedy, make_engine, reference_logits, run
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


def served(path: Path, **options: Any) -> LoadedModel:
    config = {"model": str(path), "dtype": "float32", "kv_cache_bytes": 1 << 24, "num_threads": 1, **options}
    return load(EngineConfig.model_validate(config))


def rows_of(loaded: LoadedModel) -> np.ndarray[Any, Any]:
    return run(make_engine(loaded), [greedy("a", PROMPT, 0, EVERY_ROW)])["a", 0].prompt_rows


def stored(directory: Path) -> Int4Model:
    config = int4_config(json.loads((directory / "config.json").read_bytes()), "model")
    assert config is not None
    return Int4Model(directory, config, torch.float32, CPU)


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
    assert np.abs(rows_of(loaded) - reference_logits(model, PROMPT)).max() <= 1e-3
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
    assert np.abs(rows_of(loaded) - reference_logits(model, PROMPT)).max() <= 1e-3


def test_an_architecture_that_is_not_fused_is_multiplied_packed(tmp_path: Path) -> None:
    """Reference: transformers in float32. Tolerance: 1e-3 absolute."""
    sizes = {name: getattr(tiny_llama().config, name) for name in SIZES}
    torch.manual_seed(0)
    cohere = CohereForCausalLM(CohereConfig(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2))
    model, _ = save_packed(tmp_path, Packing("gptq"), in_float16(cohere.eval()))
    loaded = served(tmp_path)
    assert loaded.info.weights.startswith("stored (INT4_")
    assert np.abs(rows_of(loaded) - reference_logits(model, PROMPT)).max() <= 1e-3


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
    assert np.abs(rows_of(loaded) - reference_logits(model, PROMPT)).max() <= 1e-3


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
    assert np.abs(rows_of(served(tmp_path)) - reference_logits(model, PROMPT)).max() <= 1e-3


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
        assert np.abs(rows_of(loaded) - reference_logits(model, PROMPT)).max() <= 1e-3


def test_a_model_in_several_files_is_served(tmp_path: Path) -> None:
    """Reference: transformers in float32. Tolerance: 1e-3 absolute."""
    model, _ = save_packed(tmp_path, Packing("awq"), num_files=3)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    check_directory(tmp_path)
    assert np.abs(rows_of(served(tmp_path)) - reference_logits(model, PROMPT)).max() <= 1e-3


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


@pytest.mark.parametrize(
    ("packing", "edits", "reason"),
    [
        (
            Packing("bitsandbytes"),
            {},
            "quantised by bitsandbytes; awq, gptq, compressed-tensors in 4 bits are",
        ),
        (Packing("fp8"), {}, "quantised by fp8"),
        (Packing("quark"), {"quant_method": None}, "quantised by none"),
        (Packing("awq"), {"bits": 8}, "bits 8; 4 is served"),
        (Packing("awq"), {"version": "gemv"}, "version 'gemv'; gemm"),
        (Packing("awq"), {"version": "marlin"}, "version 'marlin'"),
        (Packing("awq"), {"version": None, "format": "gemv_fast"}, "format 'gemv_fast'; gemm"),
        (Packing("awq"), {"backend": "llm-awq"}, "backend 'llm-awq'"),
        (Packing("awq"), {"dynamic": {"+:lm_head": {"bits": 8}}}, "dynamic"),
        (Packing("awq"), {"rotation": "random"}, "rotation 'random'"),
        (Packing("awq"), {"group_size": 16}, "group_size 16; multiples of 32"),
        (Packing("gptq"), {"bits": 3}, "bits 3"),
        (Packing("gptq"), {"bits": 2}, "bits 2"),
        (Packing("gptq"), {"bits": True}, "bits True"),
        (Packing("gptq"), {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'; gptq or gptq_v2"),
        (Packing("gptq"), {"is_marlin_format": True}, "is_marlin_format True"),
        (Packing("gptq"), {"dynamic": {"+:lm_head": {"bits": 8}}}, "dynamic"),
        (Packing("gptq"), {"checkpoint_format": None, "format": "gptq_p"}, "format 'gptq_p'"),
        (Packing("gptq"), {"rotation": "hadamard"}, "rotation 'hadamard'"),
        (Packing("gptq"), {"activation": {"mode": "w4afp8"}}, "activation {'mode': 'w4afp8'}"),
        (Packing("gptq"), {"group_size": "128"}, "group_size '128'"),
        (Packing("compressed-tensors"), {"format": "float-quantized"}, "format 'float-quantized'"),
        (Packing("compressed-tensors"), {"format": "marlin-24"}, "format 'marlin-24'"),
        (Packing("compressed-tensors"), {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        (Packing("compressed-tensors"), {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24"),
        (Packing("compressed-tensors"), {"transform_config": {"R1": {}}}, "transform_config"),
        (Packing("compressed-tensors"), {"moe_sparsity_config": {"method": "prune"}}, "moe_sparsity_config"),
        (Packing("compressed-tensors"), {"config_groups": {}}, "no config_groups"),
        (Packing("compressed-tensors"), {"config_groups": [1]}, "no JSON object"),
        (
            Packing("compressed-tensors"),
            {"config_groups": {"a": {"weights": {"num_bits": 8}}}},
            "config_groups.a.weights.num_bits 8; 4 is served",
        ),
        (
            Packing("compressed-tensors"),
            {"config_groups": {"a": {"weights": {"num_bits": 4, "type": "float"}}}},
            "weights.type 'float'; int is served",
        ),
        (
            Packing("compressed-tensors"),
            {"config_groups": {"a": {"weights": {"num_bits": 4, "strategy": "tensor"}}}},
            "weights.strategy 'tensor'",
        ),
        (
            Packing("compressed-tensors"),
            {"config_groups": {"a": {"weights": {"num_bits": 4}, "input_activations": {"num_bits": 8}}}},
            "config_groups.a.input_activations",
        ),
    ],
)
def test_other_ways_of_quantisation_are_refused_by_name(
    packing: Packing, edits: dict[str, Any], reason: str
) -> None:
    own = quantization_config(packing) | edits
    fields = {"quantization_config": {name: value for name, value in own.items() if value is not None}}
    with pytest.raises(CheckpointError, match="model cannot be served") as refusal:
        int4_config(fields, "model")
    assert reason in str(refusal.value)


def test_floats_and_mxfp4_are_left_to_transformers() -> None:
    assert int4_config({}, "model") is None
    assert int4_config({"quantization_config": {"quant_method": "mxfp4"}}, "model") is None
    with pytest.raises(CheckpointError, match="no JSON object"):
        int4_config({"quantization_config": "awq"}, "model")


def edit_tensors(directory: Path, edit: Any) -> None:
    path = directory / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file(edit(tensors), path)


DOWN = "model.layers.1.mlp.down_proj"


def without(name: str) -> Any:
    return lambda tensors: {own: tensor for own, tensor in tensors.items() if own != name}


def changed(name: str, change: Any) -> Any:
    return lambda tensors: tensors | {name: change(tensors[name]).contiguous()}


@pytest.mark.parametrize(
    ("packing", "edit", "reason"),
    [
        (Packing("awq"), without(f"{DOWN}.qzeros"), f"{DOWN} is packed, and it has no qzeros"),
        (Packing("gptq"), without(f"{DOWN}.scales"), "it has no scales"),
        (Packing("gptq"), without(f"{DOWN}.qweight"), "it has no qweight"),
        (Packing("awq"), changed(f"{DOWN}.scales", lambda t: t[:, :8]), "its scales is F16 [8, 8]"),
        (Packing("awq"), changed(f"{DOWN}.scales", lambda t: t[:3]), "its 256 columns are in 3 groups"),
        (Packing("awq"), changed(f"{DOWN}.qweight", lambda t: t[0]), "its qweight is I32 [16]"),
        (Packing("awq"), changed(f"{DOWN}.qweight", lambda t: t.short()), "its qweight is I16"),
        (Packing("gptq"), changed(f"{DOWN}.g_idx", lambda t: t[1:]), "its g_idx is I32 [255]"),
        (
            Packing("compressed-tensors"),
            without(f"{DOWN}.weight_zero_point"),
            "it has no weight_zero_point",
        ),
        (
            Packing("gptq"),
            lambda tensors: {name: t for name, t in tensors.items() if name.endswith("norm.weight")},
            "no layer is packed",
        ),
    ],
)
def test_packed_layers_whose_tensors_do_not_fit_are_refused_by_name(
    tmp_path: Path, packing: Packing, edit: Any, reason: str
) -> None:
    save_packed(tmp_path, packing)
    edit_tensors(tmp_path, edit)
    with pytest.raises(CheckpointError) as refusal:
        check_directory(tmp_path)
    assert reason in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("packing", "edit", "reason"),
    [
        (Packing("awq"), without("model.norm.weight"), "it has no tensor for model.norm.weight"),
        (
            Packing("awq"),
            changed("lm_head.weight", lambda t: t[:7]),
            "lm_head.weight is [7, 128], and by config.json lm_head.weight is [304, 128]",
        ),
        (
            Packing("awq"),
            lambda tensors: tensors | {"model.layers.0.self_attn.k_scale": torch.ones(1)},
            "k_scale, which LlamaForCausalLM does not have",
        ),
        (Packing("gptq"), changed(f"{DOWN}.g_idx", lambda t: t + 1), "names groups beyond the 8 there are"),
        (
            Packing("gptq"),
            changed(f"{DOWN}.scales", lambda t: t * torch.inf),
            "holds numbers that are not finite",
        ),
        (
            Packing("compressed-tensors"),
            changed(f"{DOWN}.weight_shape", lambda t: t.flip(0)),
            "weight_shape is [256, 128] for [128, 256]",
        ),
    ],
)
def test_a_model_that_its_files_contradict_is_refused_by_name(
    tmp_path: Path, packing: Packing, edit: Any, reason: str
) -> None:
    save_packed(tmp_path, packing)
    edit_tensors(tmp_path, edit)
    with pytest.raises(CheckpointError) as refusal:
        served(tmp_path)
    assert reason in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        (b"{", "is not an index of weights"),
        (b"[]", "is not an index of weights"),
        ({"weight_map": {}}, "it names none"),
        ({"weight_map": {"a": 3}}, "names 3 for a, which is no file in"),
        ({"weight_map": {"a": "../model.safetensors"}}, "which is no file in"),
        ({"weight_map": {"a": "/etc/passwd"}}, "which is no file in"),
        ({"weight_map": {"a": "a\0b"}}, "which is no file in"),
        ({"weight_map": {"a": "b.safetensors"}}, "names 'b.safetensors' for a, which is no file in"),
        (
            {"weight_map": {"a": "model-00001-of-00002.safetensors"}},
            "says that a is in model-00001-of-00002.safetensors, and it is not",
        ),
    ],
)
@pytest.mark.parametrize("is_packed", [True, False])
def test_an_index_that_lies_is_refused_in_a_sentence(
    tmp_path: Path, index: bytes | dict[str, Any], reason: str, *, is_packed: bool
) -> None:
    save_packed(tmp_path, Packing("awq"), num_files=2)
    if not is_packed:
        config = json.loads((tmp_path / "config.json").read_text())
        del config["quantization_config"]
        (tmp_path / "config.json").write_text(json.dumps(config))
    content = index if isinstance(index, bytes) else json.dumps(index).encode()
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(CheckpointError) as refusal:
        check_directory(tmp_path)
    assert reason in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_file_that_is_cut_is_refused_by_name(tmp_path: Path) -> None:
    save_packed(tmp_path, Packing("awq"), num_files=2)
    file = max(tmp_path.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"{file.name} cannot be read"):
        check_directory(tmp_path)


@pytest.mark.parametrize("place", [("compression_config",), ("text_config", "quantization_config")])
def test_other_places_of_the_quantization_config_are_read(tmp_path: Path, place: tuple[str, ...]) -> None:
    _, weights = save_packed(tmp_path, Packing("compressed-tensors"))
    fields = json.loads((tmp_path / "config.json").read_text())
    moved: Any = fields.pop("quantization_config")
    for key in reversed(place):
        moved = {key: moved}
    if place == ("compression_config",):
        (tmp_path / "config.json").write_text(json.dumps(fields | moved))
        name = f"{DOWN}.weight"
        assert torch.equal(stored(tmp_path).weights().dense(name), weights[name].float())
    with pytest.raises(CheckpointError, match="quantised by fp8"):
        int4_config(json.loads(json.dumps(fields | moved).replace("compressed-tensors", "fp8")), "model")


@pytest.mark.parametrize("packing", [Packing("gptq"), Packing("compressed-tensors")], ids=str)
def test_packed_layers_without_a_word_in_the_config_are_refused(tmp_path: Path, packing: Packing) -> None:
    """Old GPTQ checkpoints have a file of its own for it."""
    save_packed(tmp_path, packing)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="has no quantization_config"):
        check_directory(tmp_path)


@pytest.mark.parametrize("change", [{"hidden_size": "wide"}, {"num_attention_heads": 0}])
def test_a_config_that_makes_no_model_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    save_packed(tmp_path, Packing("awq"))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match="could not be loaded"):
        served(tmp_path)


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
    assert np.abs(rows_of(loaded) - reference_logits(model, PROMPT)).max() <= 1e-3


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


def test_classifiers_are_refused_while_their_layers_are_packed(tmp_path: Path) -> None:
    save_packed(tmp_path, Packing("awq"))
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = ["LlamaForSequenceClassification"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="LlamaForSequenceClassification has packed linear layers"):
        served(tmp_path)
