"""Continuous batching over a paged KV cache, with logits as a field of every step's output.

This package can be imported without torch; `logitengine.engine` and its dependencies cannot.
"""

from logitengine.config import EngineConfig
from logitengine.errors import (
    EngineDeadError,
    EngineError,
    EngineNotReadyError,
    EngineOverloadedError,
    RequestFatalError,
    RequestRefusedError,
)
from logitengine.link.client import EngineClient
from logitengine.link.engine_protocol import EngineProtocol
from logitengine.link.messages import GenerationRequest, LogitsSpec, ModelInfo, SamplingParams, StepOutput

__all__ = [
    "EngineClient",
    "EngineConfig",
    "EngineDeadError",
    "EngineError",
    "EngineNotReadyError",
    "EngineOverloadedError",
    "EngineProtocol",
    "GenerationRequest",
    "LogitsSpec",
    "ModelInfo",
    "RequestFatalError",
    "RequestRefusedError",
    "SamplingParams",
    "StepOutput",
]
