"""Errors of the engine.

CheckpointError              the model cannot be found, read or served

EngineError                  base of the engine client's errors
├── EngineNotReadyError      still loading, draining, or restarting after a crash
├── EngineDeadError          died while working on this request
├── EngineOverloadedError    the queue is full
└── RequestRefusedError      this request cannot be served (the message says why)
"""

from __future__ import annotations


class CheckpointError(Exception):
    """The model cannot be found, read or served; the message says why, and what to do."""


class EngineError(Exception):
    """Base of every error that the engine client raises."""


class EngineNotReadyError(EngineError):
    """The engine takes no requests at the moment."""


class EngineDeadError(EngineError):
    """The engine process died while working on the request."""


class EngineOverloadedError(EngineError):
    """The queue of waiting requests is full."""


class RequestRefusedError(EngineError):
    """The engine can never serve this request."""
