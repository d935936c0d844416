from __future__ import annotations

import os
from pathlib import Path

import pytest
from logitengine.config import EngineConfig
from logitengine.loader import LoadedModel, load


@pytest.fixture(scope="session")
def float32_model() -> LoadedModel:
    return load(EngineConfig(dtype="float32", kv_cache_bytes=1 << 30, num_threads=1))


@pytest.fixture(scope="session")
def bfloat16_model() -> LoadedModel:
    return load(EngineConfig(dtype="bfloat16", kv_cache_bytes=1 << 29, num_threads=1))


@pytest.fixture(scope="session")
def tiny_model(tiny_llama: Path) -> LoadedModel:
    """On the kernels that LOGITSERVE_KERNELS names, else on this machine's own."""
    return load(
        EngineConfig.model_validate(
            {
                "model": str(tiny_llama),
                "dtype": "float32",
                "kernels": os.environ.get("LOGITSERVE_KERNELS", "auto"),
                "kv_cache_bytes": 1 << 24,
                "num_threads": 1,
            }
        )
    )
