"""The state that the routes share: the served model, and the failure of a load."""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec
import pytest
from logitengine.errors import CheckpointError, EngineDeadError
from logitengine.link.messages import ModelInfo
from logitserve.config import ServerConfig
from logitserve.state import ServerState
from scripted_engine import OpenApp, ScriptedEngine

pytestmark = pytest.mark.anyio


class Unloadable(ScriptedEngine):
    """Engine whose model cannot be loaded, because of ``error``."""

    def __init__(self, info: ModelInfo, error: Exception) -> None:
        super().__init__(info, lambda _: [])
        self.error = error

    async def wait_ready(self) -> ModelInfo:
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        EngineDeadError("no such model"),
        TypeError("no such model"),
        Exception("no such model"),
        KeyError("no such model"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_any_failure_to_load_is_reported_and_ends_the_server(
    model_info: ModelInfo, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    state = ServerState(Unloadable(model_info, error), ServerConfig())
    ended: list[bool] = []
    state.stop_server = lambda: ended.append(True)
    await state.load()
    assert ended == [True]
    assert "no such model" in (state.load_error or "")
    assert state.not_ready_reason() == state.load_error
    assert len([record for record in caplog.records if record.levelno >= logging.ERROR]) == 1


async def test_a_model_that_cannot_be_served_is_told_by_the_command_and_not_logged(
    model_info: ModelInfo, caplog: pytest.LogCaptureFixture
) -> None:
    error = CheckpointError("its files are damaged")
    state = ServerState(Unloadable(model_info, error), ServerConfig())
    await state.load()
    assert state.unservable is error
    assert state.not_ready_reason() == "the model could not be loaded: its files are damaged"
    assert caplog.records == []


@pytest.mark.parametrize("content", [None, b"{", b"[]", b'{"model": {}}', b"\xff" * 9])
async def test_a_damaged_tokenizer_is_one_that_cannot_be_served(
    model_info: ModelInfo, tmp_path: Path, content: bytes | None
) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    engine = ScriptedEngine(msgspec.structs.replace(model_info, tokenizer_path=str(tmp_path)), lambda _: [])
    state = ServerState(engine, ServerConfig())
    await state.load()
    assert f"the tokenizer of {tmp_path} cannot be read: " in str(state.unservable)


async def test_the_model_is_the_one_that_the_engine_serves_after_a_restart(
    open_app: OpenApp, model_info: ModelInfo
) -> None:
    async with open_app() as app:
        before = (await app.client.get("/v1/models")).json()["data"][0]
        app.engine.info = msgspec.structs.replace(model_info, max_model_len=8)
        after = (await app.client.get("/v1/models")).json()["data"][0]
        refused = await app.post("/v1/completions", {"prompt": [5] * 8, "max_tokens": 1})
    assert (before["max_model_len"], after["max_model_len"]) == (64, 8)
    assert refused.status_code == 400
    assert "context length is 8 tokens" in refused.json()["error"]["message"]
