"""Description of a loaded model, and models that are refused before anything is served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from logitengine.config import EngineConfig
from logitengine.errors import CheckpointError
from logitengine.model.checkpoint.resolve import resolve_checkpoint
from logitengine.model.loader import LoadedModel, load
from logitengine.model.pretrained import load_pretrained
from safetensors.torch import save_file
from tiny_models import save_llama
from transformers import CohereConfig, CohereForCausalLM, GptOssConfig, GptOssForCausalLM
from transformers.quantizers import quantizer_mxfp4


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"), vocab_size=64)


@pytest.fixture(scope="module")
def cohere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An architecture that runs through transformers' own modules."""
    directory = tmp_path_factory.mktemp("cohere")
    config = CohereConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    CohereForCausalLM(config).save_pretrained(directory)
    (directory / "tokenizer.json").write_text("{}")
    return directory


def loaded(path: Path, **options: Any) -> LoadedModel:
    defaults = {"dtype": "float32", "num_blocks": 16, "num_threads": 1}
    return load(EngineConfig.model_validate({"model": str(path), **defaults, **options}))


def test_the_info_says_what_was_loaded(llama: Path) -> None:
    info = loaded(llama, max_model_len=100, block_size=8).info
    assert (info.architecture, info.dtype, info.device) == ("LlamaForCausalLM", "float32", "cpu")
    assert (info.vocab_size, info.hidden_size, info.eos_token_ids) == (64, 64, [2])
    assert (info.num_blocks, info.block_size, info.max_model_len) == (16, 8, 100)
    assert (info.can_generate, info.heads) == (True, {})


def test_a_sequence_is_no_longer_than_the_cache(llama: Path) -> None:
    assert loaded(llama, block_size=8).info.max_model_len == 16 * 8


def test_the_cache_is_as_large_as_its_memory_allows(llama: Path) -> None:
    """Two layers of two heads of 32 float32 make 1,024 bytes of keys and values per token."""
    info = loaded(llama, num_blocks=None, kv_cache_bytes=1 << 20, block_size=8).info
    assert info.num_blocks == (1 << 20) // (8 * 1024)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_model_len": 4096}, "exceeds the model's own 2048 positions"),
        ({"max_model_len": 2048, "block_size": 8}, "more than the 128 tokens of the KV cache"),
        ({"kernels": "triton", "device": "cuda"}, "cuda"),
        ({"weights": "stored"}, "needs a GGUF file"),
        ({"weights": "int8", "kernels": "reference"}, "do not multiply weights=int8"),
        ({"weights": "int4", "kernels": "reference"}, "do not multiply weights=int4"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(
    llama: Path, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(CheckpointError, match=reason):
        loaded(llama, **options)


def test_native_kernels_that_cannot_be_compiled_are_refused(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"no C\+\+ compiler"):
        loaded(llama, kernels="cpu")


def test_batch_invariance_is_refused_for_a_network_that_is_not_fused(cohere: Path) -> None:
    if loaded(cohere).info.kernels != "cpu":
        pytest.skip("the native kernels do not run on this machine")
    with pytest.raises(CheckpointError, match="transformers' own modules"):
        loaded(cohere, batch_invariant=True)


def test_layers_that_attend_otherwise_are_refused_by_name(llama: Path, tmp_path: Path) -> None:
    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "layer_types": ["chunked_attention"] * 2}))
    with pytest.raises(CheckpointError, match="layers of type chunked_attention"):
        loaded(tmp_path)


E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def test_directories_of_mxfp4_are_dequantised_whatever_packages_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: the OCP format, to the bit. Blocks are [E, N, K / 32, 16] bytes, the first number in the low nibble."""
    experts, size = 2, 64
    config = GptOssConfig(
        vocab_size=64,
        hidden_size=size,
        intermediate_size=size,
        num_hidden_layers=1,
        layer_types=["full_attention"],
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=experts,
        num_experts_per_tok=1,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )
    torch.manual_seed(0)
    tensors = GptOssForCausalLM(config).state_dict()
    expected = {}
    for name, rows in (("gate_up_proj", 2 * size), ("down_proj", size)):
        path = f"model.layers.0.mlp.experts.{name}"
        blocks = torch.randint(256, (experts, rows, size // 32, 16), dtype=torch.uint8)
        scales = torch.randint(120, 125, (experts, rows, size // 32), dtype=torch.uint8)
        values = torch.tensor((*E2M1, *(-value for value in E2M1)))
        numbers = torch.stack((values[(blocks & 15).long()], values[(blocks >> 4).long()]), -1).flatten(-2)
        numbers = numbers * torch.exp2(scales.float() - 127)[..., None]
        expected[path] = numbers.flatten(-2).transpose(1, 2)
        del tensors[path]
        tensors |= {f"{path}_blocks": blocks, f"{path}_scales": scales}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    fields = config.to_dict() | {
        "architectures": ["GptOssForCausalLM"],
        "quantization_config": {"quant_method": "mxfp4"},
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    (tmp_path / "tokenizer.json").write_text("{}")

    def fail(*_: object) -> bool:
        raise AssertionError("transformers looks for packages")

    for name in ("is_kernels_available", "is_triton_available", "is_accelerate_available"):
        monkeypatch.setattr(quantizer_mxfp4, name, fail)
    model = load_pretrained(resolve_checkpoint(str(tmp_path)), torch.float32, torch.device("cpu"))
    for path, numbers in expected.items():
        assert torch.equal(model.get_parameter(path), numbers)
    assert loaded(tmp_path).info.weights == "dense"
