"""Parts of a message as they are found: joined, without the white space at their borders and without hidden tokens."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from logitserve.text.parser import Content, Reasoning, TextPart, ToolCall
from logitserve.text.stop_strings import overlap

_BLANK = " \t\r\n"


class MessageParts:
    """Collects parts. White space is held back until it is known whether it touches a border.

    Args:
        hidden: strings that content does not show.

    Attributes:
        is_at_border: whether nothing but white space stands behind the latest border.
    """

    def __init__(self, hidden: Collection[str]) -> None:
        longest_first = sorted(hidden, key=len, reverse=True)
        self._hidden = re.compile("|".join(map(re.escape, longest_first))) if hidden else None
        self._hidden_strings = longest_first
        self._spelled = ""
        self._space: list[str] = []
        self._space_kind: type[Content | Reasoning] = Content
        self.is_at_border = False
        self._parts: list[TextPart] = []

    def content(self, text: str) -> None:
        """Add text for the reader."""
        if self._hidden is not None:
            *pieces, last = self._hidden.split(self._spelled + text)
            keep = max(overlap(last, hidden) for hidden in self._hidden_strings)
            cut = len(last) - keep
            text, self._spelled = "".join(pieces) + last[:cut], last[cut:]
        self._add(Content, text)

    def reasoning(self, text: str) -> None:
        """Add text of the thinking."""
        self._add(Reasoning, text)

    def call(self, call: ToolCall) -> None:
        """Add a call."""
        self.border()
        self._parts.append(call)

    def pause(self) -> None:
        """Take text that may become a hidden string as what it is: a region begins or ends."""
        spelled, self._spelled = self._spelled, ""
        self._add(Content, spelled)

    def border(self) -> None:
        """Drop the white space here, before it and after."""
        self.pause()
        self._space.clear()
        self.is_at_border = True

    def forget(self) -> None:
        """Drop the parts, and what is held back."""
        self.pause()
        self._space.clear()
        self._parts = []

    def end(self) -> None:
        """Take white space at the end of the answer as what it follows, unless it touches a border."""
        self.pause()
        if self._space:
            self._append(self._space_kind, "")

    def take(self) -> Sequence[TextPart]:
        """Return the parts since the last call."""
        if not self._parts:
            return ()
        parts, self._parts = self._parts, []
        return parts

    def _add(self, kind: type[Content | Reasoning], text: str) -> None:
        if self.is_at_border:
            text = text.lstrip(_BLANK)
        if not text:
            return
        self.is_at_border = False
        visible = text.rstrip(_BLANK)
        if visible:
            self._append(kind, visible)
        if len(visible) < len(text):
            self._space.append(text[len(visible) :])
            self._space_kind = kind

    def _append(self, kind: type[Content | Reasoning], text: str) -> None:
        """Append text behind the white space held back, to the latest part where that is of the same kind."""
        if self._space:
            text = "".join(self._space) + text
            self._space.clear()
        latest = self._parts[-1] if self._parts else None
        if isinstance(latest, kind):
            self._parts[-1] = kind(latest.text + text)
        else:
            self._parts.append(kind(text))
