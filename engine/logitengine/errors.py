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

MOST_CHARACTERS = 500
"""Longest message of a CheckpointError."""


class CheckpointError(Exception):
    """The model cannot be found, read or served; the message says why, and what to do.

    Messages quote files that come from anywhere, and errors of libraries that quote them: every message is made one line
    of printable characters, and its middle is left out if it is long.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_one_line(message))


def _one_line(text: str) -> str:
    ends = MOST_CHARACTERS // 2
    if len(text) > 4 * MOST_CHARACTERS:  # most of what is left out need not be looked at
        text = text[: 2 * MOST_CHARACTERS] + text[-2 * MOST_CHARACTERS :]
    line = " ".join(text.split())
    line = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)
    return line if len(line) <= MOST_CHARACTERS else f"{line[: ends - 5]} [...] {line[5 - ends :]}"


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
