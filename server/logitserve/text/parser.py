"""A choice's text as parts: what stands between stop strings and the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the reader."""

    text: str


TextPart = Content


class TextParser(Protocol):
    """Cuts a choice's text into parts as it comes. The parts do not depend on how the text was cut."""

    def push(self, text: str) -> Sequence[TextPart]:
        """The parts that more text makes certain."""

    def finish(self) -> Sequence[TextPart]:
        """The parts that were held back, once there is no more text."""


class PlainText:
    """A TextParser for models and requests without tools and reasoning: all text is content."""

    def push(self, text: str) -> Sequence[TextPart]:
        return (Content(text),) if text else ()

    def finish(self) -> Sequence[TextPart]:
        return ()
