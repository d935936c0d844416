"""Description of a loaded model, and models that are refused before anything is served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from logitengine.config import EngineConfig
from logitengine.errors import CheckpointError
from logitengine.model.loader import LoadedModel, load
from tiny_models import save_llama
from transformers import CohereConfig, CohereForCausalLM


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
