"""A choice's text as parts: what stands between stop strings and the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the reader."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text of the model's thinking."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A whole call of a function.

    Attributes:
        index: number of the call in its choice, from 0.
        arguments: a JSON object, as the model wrote it where its family writes JSON.
    """

    index: int
    id: str
    name: str
    arguments: str


TextPart = Content | Reasoning | ToolCall


class TextParser(Protocol):
    """Cuts a choice's text into parts as it comes. The parts joined do not depend on how the text was cut."""

    @property
    def in_reasoning(self) -> bool:
        """Whether the text so far ends within the thinking."""

    @property
    def has_calls(self) -> bool:
        """Whether a ToolCall was given."""

    def push(self, text: str) -> Sequence[TextPart]:
        """Return the parts that more text makes certain."""

    def finish(self) -> Sequence[TextPart]:
        """Return the parts that were held back, once there is no more text."""


class PlainText:
    """A TextParser for models and requests without tools and reasoning: all text is content."""

    in_reasoning = False
    has_calls = False

    def push(self, text: str) -> Sequence[TextPart]:
        return (Content(text),) if text else ()

    def finish(self) -> Sequence[TextPart]:
        return ()
