"""The input: a JSONL file of prompts. All of it is checked first, and then lines are read as they are needed."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import orjson
from pydantic import Field, StrictInt, ValidationError, model_validator

from logitserve.config import LARGEST_ID, ServerConfig
from logitserve.errors import from_validation
from logitserve.extract.errors import UsageError
from logitserve.protocol.base import StrictModel
from logitserve.protocol.chat import Message
from logitserve.protocol.rows import TokenId

UNBOUNDED = ServerConfig(max_messages=LARGEST_ID)
"""Options to validate a line with: the server that is asked has bounds of its own."""


class _Line(StrictModel):
    """Members of a line."""

    id: str | StrictInt | None = None
    prompt: str | list[TokenId] | None = Field(None, min_length=1)
    messages: list[Message] | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            msg = "exactly one of 'prompt' and 'messages' is needed"
            raise ValueError(msg)
        return self


@dataclass(frozen=True, slots=True)
class Prompt:
    """A line. ``source`` is its part of the request body: ``input`` or ``messages``."""

    index: int
    id: str
    source: dict[str, Any]


class PromptFile:
    """A checked file of prompts. It holds the offset of each line in memory, not the lines."""

    def __init__(self, path: Path) -> None:
        """Check every line. Raises UsageError with the number of the first malformed one."""
        self._path = path
        self._starts = array("Q", [0])
        digest = hashlib.sha256()
        try:
            with path.open("rb") as file:
                for index, line in enumerate(file):
                    digest.update(line)
                    _parse(line, index)
                    self._starts.append(self._starts[-1] + len(line))
        except OSError as error:
            msg = f"{path} cannot be read: {error.strerror}"
            raise UsageError(msg) from error
        if len(self) == 0:
            msg = f"{path} holds no prompts"
            raise UsageError(msg)
        self.sha256 = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._starts) - 1

    def read(self, indices: Sequence[int]) -> list[Prompt]:
        """Return the prompts of consecutive lines."""
        with self._path.open("rb") as file:
            file.seek(self._starts[indices[0]])
            return [_parse(file.readline(), index) for index in indices]

    def ids(self) -> list[str]:
        """Return the id of every prompt."""
        with self._path.open("rb") as file:
            return [_parse(line, index).id for index, line in enumerate(file)]


def _parse(line: bytes, index: int) -> Prompt:
    try:
        raw = orjson.loads(line)
        if not isinstance(raw, dict):
            msg = f"line {index + 1}: not a JSON object"
            raise UsageError(msg)
        checked = _Line.model_validate(raw, context=UNBOUNDED)
    except orjson.JSONDecodeError as error:
        msg = f"line {index + 1}: not valid JSON: {error}" if line.strip() else f"line {index + 1}: empty"
        raise UsageError(msg) from None
    except ValidationError as error:
        msg = f"line {index + 1}: {from_validation(error).message}"
        raise UsageError(msg) from None
    name = str(index) if checked.id is None else str(checked.id)
    source = {"messages": raw["messages"]} if checked.prompt is None else {"input": raw["prompt"]}
    return Prompt(index, name, source)
