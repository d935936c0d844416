"""The server's handle on an engine in a separate process. Never imports torch."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Sequence

from logitengine.config import EngineConfig
from logitengine.link.engine_protocol import EngineProtocol
from logitengine.link.messages import EngineStats, GenerationRequest, ModelInfo, StepOutput
from logitengine.link.streams import Streams
from logitengine.link.supervisor import ENGINE_COMMAND, Supervisor


class EngineClient(EngineProtocol):
    """A supervised process and the streams to it.

    When the process dies or hangs, another one is started, unless three die quickly in a row (`wait_lost`). Requests
    that have given an output end with EngineDeadError; the others wait for the next process, and newcomers too.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        command: Sequence[str] = ENGINE_COMMAND,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._streams = Streams(config.logits_window_bytes)
        self._supervisor = Supervisor(config, self._streams, command=command, clock=clock)

    @property
    def info(self) -> ModelInfo | None:
        return self._supervisor.info

    @property
    def stats(self) -> EngineStats:
        """Statistics that the process sent last."""
        return self._supervisor.stats

    @property
    def pid(self) -> int | None:
        """Id of the engine process, or None when there is none."""
        return self._supervisor.pid

    async def start(self) -> None:
        """Spawn the engine; the model loads in the background. Does nothing if it was already started."""
        await self._supervisor.start()

    async def close(self) -> None:
        await self._supervisor.close()

    async def wait_located(self) -> str:
        return await self._supervisor.wait_located()

    async def wait_ready(self) -> ModelInfo:
        return await self._supervisor.wait_ready()

    async def wait_lost(self) -> str:
        return await self._supervisor.wait_lost()

    def not_ready_reason(self) -> str | None:
        return self._supervisor.not_ready_reason()

    def generate(self, request: GenerationRequest) -> AsyncGenerator[StepOutput, None]:
        return self._streams.generate(request)

    def abort_choice(self, request_id: str, index: int) -> None:
        self._streams.abort_choice(request_id, index)
