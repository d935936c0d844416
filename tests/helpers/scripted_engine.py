"""An engine that follows a test's script, behind the real app.

The script makes it behave in ways that a real engine does not show on demand.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import httpx
from fastapi import FastAPI
from logitengine.errors import EngineError
from logitengine.link.engine_protocol import EngineProtocol
from logitengine.link.messages import EngineStats, GenerationRequest, ModelInfo, StepOutput
from logitserve.state import ServerState

Step = StepOutput | EngineError | Awaitable[Any]
Script = Callable[[GenerationRequest], list[Step]]


class ScriptedEngine(EngineProtocol):
    """Engine that yields the outputs of ``script``, raises its errors and awaits its awaitables."""

    def __init__(self, info: ModelInfo, script: Script) -> None:
        self._info: ModelInfo | None = info
        self.script = script
        self.reason: str | None = None
        self.requests: list[GenerationRequest] = []
        self.lost = asyncio.Event()
        self.aborted: list[tuple[str, int]] = []
        self.num_open = 0
        self._stats = EngineStats()
        self._num_restarts = 0
        self._changed = asyncio.Condition()

    async def running(self, count: int) -> None:
        """Wait until this many requests run."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.num_open >= count)

    @property
    def info(self) -> ModelInfo | None:
        return self._info

    @info.setter
    def info(self, info: ModelInfo) -> None:
        self._info = info

    @property
    def stats(self) -> EngineStats:
        return self._stats

    @stats.setter
    def stats(self, stats: EngineStats) -> None:
        self._stats = stats

    @property
    def num_restarts(self) -> int:
        return self._num_restarts

    async def start(self) -> None:
        """Do nothing, since there is no process."""

    async def close(self) -> None:
        """Do nothing, since there is no process."""

    async def wait_located(self) -> str:
        assert self.info is not None
        return self.info.tokenizer_path

    async def wait_ready(self) -> ModelInfo:
        assert self.info is not None
        return self.info

    async def wait_lost(self) -> str:
        await self.lost.wait()
        return "the engine died too often"

    def not_ready_reason(self) -> str | None:
        return self.reason

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[StepOutput, None]:
        self.requests.append(request)
        self.num_open += 1
        async with self._changed:
            self._changed.notify_all()
        try:
            for step in self.script(request):
                if isinstance(step, EngineError):
                    raise step
                if isinstance(step, StepOutput):
                    if (request.request_id, step.index) not in self.aborted:
                        yield step
                else:
                    await step
        finally:
            self.num_open -= 1

    def abort_choice(self, request_id: str, index: int) -> None:
        self.aborted.append((request_id, index))


class App:
    """A running app, a client for it, and the engine behind it."""

    def __init__(self, app: FastAPI, engine: ScriptedEngine, client: httpx.AsyncClient) -> None:
        self.asgi = app
        self.engine = engine
        self.client = client
        self.state: ServerState = app.state.server

    async def post(self, path: str, body: dict[str, Any], **options: Any) -> httpx.Response:
        return await self.client.post(path, json=body, **options)

    async def asgi_post(
        self,
        path: str,
        body: dict[str, Any] | None,
        send: Callable[[Any], Awaitable[None]],
        **scope: Any,
    ) -> None:
        """Call the app with a POST, or a GET without a body, from a client that stays connected.

        No HTTP library is involved. Returns when the app returns.
        """
        content = b"" if body is None else json.dumps(body).encode()
        told = [{"type": "http.request", "body": content, "more_body": False}]

        async def receive() -> dict[str, Any]:
            return told.pop() if told else await asyncio.Event().wait()  # type: ignore[return-value]

        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "GET" if body is None else "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"host", b"test"), (b"content-type", b"application/json")],
            "client": ("test", 1),
            "server": ("test", 80),
            **scope,
        }
        await self.asgi(scope, receive, send)


OpenApp = Callable[..., contextlib.AbstractAsyncContextManager[App]]
