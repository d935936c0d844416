from __future__ import annotations

from pathlib import Path

import pytest
from byte_model import save_byte_model
from grammar_requests import VOCAB
from logitengine.config import EngineConfig
from logitengine.model.loader import LoadedModel, load
from tiny_models import save_llama


@pytest.fixture(scope="session")
def float32_model() -> LoadedModel:
    return load(EngineConfig(dtype="float32", kv_cache_bytes=1 << 30, num_threads=1))


@pytest.fixture(scope="session")
def bfloat16_model() -> LoadedModel:
    return load(EngineConfig(dtype="bfloat16", kv_cache_bytes=1 << 29, num_threads=1))


@pytest.fixture(scope="session", params=["auto", pytest.param("triton", marks=pytest.mark.interpreted)])
def tiny_model(tiny_llama: Path, request: pytest.FixtureRequest) -> LoadedModel:
    """The tiny model on this machine's own kernels, and on those of a GPU under Triton's interpreter."""
    return load(
        EngineConfig(
            model=str(tiny_llama),
            dtype="float32",
            kernels=request.param,
            kv_cache_bytes=1 << 24,
            num_threads=1,
        )
    )


@pytest.fixture(scope="session")
def byte_model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a model that reads and writes bytes. Its head has more logits than the tokenizer has tokens."""
    directory = save_byte_model(tmp_path_factory.mktemp("byte-model"))
    tokenizer = (directory / "tokenizer.json").read_bytes()
    save_llama(directory, vocab_size=VOCAB, num_hidden_layers=1)
    (directory / "tokenizer.json").write_bytes(tokenizer)
    return directory


@pytest.fixture(scope="session")
def byte_model(byte_model_directory: Path) -> LoadedModel:
    return load(
        EngineConfig(model=str(byte_model_directory), dtype="float32", kv_cache_bytes=1 << 24, num_threads=1)
    )
