"""Errors of the engine.

CheckpointError              the model cannot be found, read or served

EngineError                  base of the engine client's errors
├── EngineNotReadyError      still loading, or ended
├── EngineDeadError          ended before it had finished this request
│   └── RequestFatalError    so did the next process, maybe because of this request
├── EngineOverloadedError    the queue is full
└── RequestRefusedError      this request cannot be served (the message says why)
"""

from __future__ import annotations


class CheckpointError(Exception):
    """The model cannot be found, read or served; the message says why, and what to do."""


class EngineError(Exception):
    """Base of every error that the engine client raises."""


class EngineNotReadyError(EngineError):
    """The engine takes no requests: its model is not loaded, or it has ended."""


class EngineDeadError(EngineError):
    """The engine process died while working on the request, or the engine ended before it was finished."""


class RequestFatalError(EngineDeadError):
    """As many engine processes died in turn as a request may have. Another try may end the next one."""


class EngineOverloadedError(EngineError):
    """The queue of waiting requests is full."""


class RequestRefusedError(EngineError):
    """The engine can never serve this request."""
