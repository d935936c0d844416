"""Errors that end an extraction early.

ExtractError             exit code 1: it can be resumed
├── UsageError           exit code 2: the input or an option is wrong, and nothing was computed
└── RefusedPromptError   the server does not take one prompt
"""

from __future__ import annotations


class ExtractError(Exception):
    """A run failed. Its finished parts stay."""

    exit_code = 1


class UsageError(ExtractError):
    """The input, the output or the options cannot be used."""

    exit_code = 2


class RefusedPromptError(ExtractError):
    """The server refused one prompt. ``reason`` is its message."""

    def __init__(self, prompt_index: int, reason: str) -> None:
        super().__init__(
            f"line {prompt_index + 1}: the server refused the prompt: {reason} "
            "Correct the line and start over, or go on without it by --skip-refused."
        )
        self.prompt_index = prompt_index
        self.reason = reason
