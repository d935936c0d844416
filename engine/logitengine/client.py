"""The server's handle on the engine process: start it, watch it, restart it, and stream from it. Never imports torch."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from logitengine.config import EngineConfig
from logitengine.messages import EngineStats, GenerationRequest, ModelInfo, StepOutput


class EngineClient:
    """Spawns the engine in its own process and multiplexes requests over one local socket."""

    info: ModelInfo | None
    stats: EngineStats

    def __init__(self, config: EngineConfig) -> None: ...

    async def start(self) -> None:
        """Spawn the engine and return at once; the model loads in the background."""
        raise NotImplementedError

    async def wait_ready(self) -> ModelInfo:
        """Wait until the model is loaded. Raises EngineDeadError when it could not be."""
        raise NotImplementedError

    async def close(self) -> None:
        """Stop the engine process; requests under way end with EngineDeadError."""
        raise NotImplementedError

    def not_ready_reason(self) -> str | None:
        """None when requests can be served, else why not: loading, dead and restarting, or stuck."""
        raise NotImplementedError

    def generate(self, request: GenerationRequest) -> AsyncGenerator[StepOutput, None]:
        """Stream the outputs of all ``n`` choices, interleaved, until each has a finish reason.

        Closing the generator early (``aclose``, cancellation) aborts the request and frees its blocks. An output's
        arrays count against the request's window until the next one is asked for.

        Raises EngineNotReadyError, EngineOverloadedError or RequestRefusedError before the first output;
        EngineDeadError at any time.
        """
        raise NotImplementedError

    def abort_choice(self, request_id: str, index: int) -> None:
        """Stop one choice (a stop string was found, say). ``generate`` yields nothing more for it."""
        raise NotImplementedError
