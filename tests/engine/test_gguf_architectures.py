"""GGUF files of every architecture: served rows are those of the transformers model that the file was written from."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from block_models import Blocks, fill_with_blocks
from gguf_cases import CASES, Case, model_of
from gguf_files import write_gguf
from logitengine.config import EngineConfig
from logitengine.model.checkpoint.resolve import resolve_checkpoint
from logitengine.model.gguf.architectures import CONFIGS
from logitengine.model.gguf.model import GgufModel
from logitengine.model.loader import LoadedModel, prepare
from logitengine.run.devices import choose_device
from logitkernels.backend import load_kernels
from support import reference_logits, rows_of, served
from transformers import PreTrainedModel

PROMPT = list(range(60, 108))

FUSED = {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"}
AS_THEY_ARE = [name for name, case in CASES.items() if case.model_type not in FUSED]
"""Cases of architectures that run through transformers' modules."""


def test_every_architecture_has_a_case() -> None:
    assert {case.architecture for case in CASES.values()} == set(CONFIGS)


@pytest.mark.parametrize("name", CASES)
def test_rows_are_those_of_the_model_that_the_file_was_written_from(name: str, tmp_path: Path) -> None:
    """Tolerance in float32: 1e-3 absolute, 1e-4 mean, of logits with a standard deviation of at least 0.3."""
    case = CASES[name]
    model = model_of(case)
    path = write_gguf(tmp_path / "model.gguf", model, case.architecture, case.keys)
    expected = reference_logits(model, PROMPT)
    error = np.abs(rows_of(served(path), PROMPT) - expected)
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
    assert np.abs(rows_of(loaded, PROMPT) - expected).max() <= 1e-3
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
    loaded = served(path)
    assert np.abs(rows_of(loaded, PROMPT) - reference_logits(model, PROMPT)).max() <= 1e-3
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
    assert np.abs(rows_of(served(path, dtype="auto"), PROMPT) - expected).mean() <= 0.6 * their_error
