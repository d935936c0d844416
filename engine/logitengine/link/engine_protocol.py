"""Interface of an engine to the server, wherever the engine runs."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from logitengine.link.messages import EngineStats, GenerationRequest, ModelInfo, StepOutput


class EngineProtocol(Protocol):
    """Takes requests and returns streams of outputs. `EngineClient` runs its engine in a separate process."""

    @property
    def info(self) -> ModelInfo | None:
        """Model of the engine that serves at the moment, or of the last one that did."""

    @property
    def stats(self) -> EngineStats:
        """Statistics that the engine sent last. Its counters go on where those of an engine before it ended."""

    @property
    def num_restarts(self) -> int:
        """Number of engines that were started in the place of one that ended."""

    async def start(self) -> None:
        """Begin to load the model. Does nothing if it was already started."""

    async def close(self) -> None:
        """Stop the engine; requests in progress end with EngineDeadError, also those that wait for a restart."""

    async def wait_located(self) -> str:
        """Wait for the model's files and return the directory of its tokenizer.

        Raises CheckpointError for a model that cannot be served, and EngineDeadError if loading fails otherwise.
        """

    async def wait_ready(self) -> ModelInfo:
        """Wait until requests can be served, also after a restart. Raises as `wait_located` does."""

    async def wait_lost(self) -> str:
        """Wait until the engine is lost: not closed, and never started again. Return the reason."""

    def not_ready_reason(self) -> str | None:
        """Return None when requests can be served, else the reason why not."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[StepOutput, None]:
        """Stream the outputs of all ``n`` choices, interleaved, until each has a finish reason.

        The first output shows that the request has left the queue, and is empty where more of the prompt is to
        be computed. Closing the generator early (``aclose``, cancellation) aborts the request and frees its
        blocks. An output's arrays count against the request's window until the next output is requested.

        A request waits while the engine is restarted.

        Raises EngineNotReadyError, EngineOverloadedError or RequestRefusedError before the first output;
        EngineDeadError at any time.
        """

    def abort_choice(self, request_id: str, index: int) -> None:
        """Stop one choice, for example at a stop string. ``generate`` yields nothing more for it."""
