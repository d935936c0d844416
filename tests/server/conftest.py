"""Fixtures that open the app over ASGI, in front of a scripted engine."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from logitengine.link.messages import ModelInfo
from logitengine.model.checkpoint.resolve import Checkpoint
from logitserve.config import ServerConfig
from logitserve.http.app import create_app
from scripted_engine import App, OpenApp, Script, ScriptedEngine
from scripted_images import ScriptedPreparer
from tokenizers import Tokenizer
from tool_chats import save_thinking_model


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def model_info(smollm2: Checkpoint) -> ModelInfo:
    return ModelInfo(
        model_path="/models/scripted",
        tokenizer_path=str(smollm2.tokenizer_path),
        architecture="LlamaForCausalLM",
        vocab_size=49152,
        hidden_size=576,
        max_model_len=64,
        eos_token_ids=[2],
        dtype="float32",
        device="cpu",
        kernels="reference",
        weights="dense",
        batch_invariant=False,
        block_size=16,
        num_blocks=64,
        kv_cache_bytes=1 << 20,
        can_generate=True,
        heads={},
        fingerprint="fp_scripted",
    )


@pytest.fixture(scope="session")
def thinking_model(tmp_path_factory: pytest.TempPathFactory, model_info: ModelInfo) -> ModelInfo:
    return save_thinking_model(tmp_path_factory.mktemp("thinking"), model_info)


@pytest.fixture(scope="session")
def tokenizer(thinking_model: ModelInfo) -> Tokenizer:
    """Return the tokenizer of the model that thinks."""
    return Tokenizer.from_file(str(Path(thinking_model.tokenizer_path) / "tokenizer.json"))


@pytest.fixture
def open_app(model_info: ModelInfo) -> OpenApp:
    @contextlib.asynccontextmanager
    async def opened(
        script: Script = lambda _: [],
        *,
        on_loopback: bool = False,
        info: ModelInfo = model_info,
        preparer: ScriptedPreparer | None = None,
        **options: Any,
    ) -> AsyncIterator[App]:
        engine = ScriptedEngine(info, script)
        app = create_app(engine, ServerConfig(**options), on_loopback=on_loopback)
        if preparer is not None:
            app.state.server.new_preparer = lambda _path, _encoder: preparer
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://test") as client,
        ):
            await asyncio.gather(*(task for task in asyncio.all_tasks() if task.get_name() == "load-model"))
            yield App(app, engine, client)

    return opened
