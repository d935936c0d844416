"""What a server needs of an engine, wherever that engine runs."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from logitengine.link.messages import GenerationRequest, ModelInfo, StepOutput


class EngineProtocol(Protocol):
    """Requests in, streams of outputs out. `EngineClient` runs its engine in a process of its own."""

    @property
    def info(self) -> ModelInfo | None:
        """The model as the engine that serves at the moment has it, or the last one that did."""

    async def start(self) -> None:
        """Begin to load the model. What was started already stays as it is."""

    async def close(self) -> None:
        """Stop; requests under way end with EngineDeadError."""

    async def wait_located(self) -> str:
        """Wait until the model's files are here; the directory of its tokenizer. Raises EngineDeadError if they cannot be."""

    async def wait_ready(self) -> ModelInfo:
        """Wait until requests can be served, also after a restart. Raises EngineDeadError if the model cannot be loaded."""

    def not_ready_reason(self) -> str | None:
        """None when requests can be served, else why not."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[StepOutput, None]:
        """Stream the outputs of all ``n`` choices, interleaved, until each has a finish reason.

        Closing the generator early (``aclose``, cancellation) aborts the request and frees its blocks. An output's
        arrays count against the request's window until the next one is asked for.

        Raises EngineNotReadyError, EngineOverloadedError or RequestRefusedError before the first output;
        EngineDeadError at any time.
        """

    def abort_choice(self, request_id: str, index: int) -> None:
        """Stop one choice (a stop string was found, say). ``generate`` yields nothing more for it."""
