from __future__ import annotations

import pytest
from logitengine.config import EngineConfig
from logitengine.loader import LoadedModel, load


@pytest.fixture(scope="session")
def float32_model() -> LoadedModel:
    return load(EngineConfig(dtype="float32", kv_cache_bytes=1 << 30))


@pytest.fixture(scope="session")
def bfloat16_model() -> LoadedModel:
    return load(EngineConfig(dtype="bfloat16", kv_cache_bytes=1 << 29))
