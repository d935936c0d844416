from __future__ import annotations

from pathlib import Path

import pytest
from logitengine.config import EngineConfig
from logitengine.model.loader import LoadedModel, load


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
