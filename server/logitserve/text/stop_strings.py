"""Stop strings, wherever the tokens' borders fall."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class StopStrings:
    """Passes text through until one of ``stops`` is whole, and holds back text that may become one.

    The match is the one that is whole first; of several ending at the same character, the longest. The match and all
    text after it are dropped. The outcome does not depend on how the text was cut.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Return the text that can no longer be part of a stop string. Nothing after a match."""
        if self.matched is not None:
            return ""
        self._held += text
        match = self._first_match()
        if match is not None:
            start, self.matched = match
            released, self._held = self._held[:start], ""
            return released
        keep = max((overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        released, self._held = self._held[:cut], self._held[cut:]
        return released

    def finish(self) -> str:
        """Return the text held back for a stop string that never came."""
        released, self._held = self._held, ""
        return released

    def _first_match(self) -> tuple[int, str] | None:
        found = [(self._held.find(stop), stop) for stop in self._stops]
        ends = [(start + len(stop), start, stop) for start, stop in found if start >= 0]
        if not ends:
            return None
        _, start, stop = min(ends)
        return start, stop


def overlap(text: str, stop: str) -> int:
    """Return the length of the longest proper prefix of ``stop`` that ``text`` ends with."""
    return next((k for k in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:k])), 0)


class ThinkingGate:
    """Tells the thinking from the text after it, in which stop strings begin to count.

    The thinking is open at first, or it opens the text, behind white space perhaps. The outcome does not depend on how
    the text was cut. What is held back is shorter than ``opening`` and the white space before it, of which
    MOST_SPACE characters are looked at.

    Args:
        opening, closing: strings around the thinking.
    """

    MOST_SPACE = 16

    def __init__(self, opening: str, closing: str, *, is_open: bool) -> None:
        self._opening = opening
        self._closing = closing
        self._is_open = is_open
        self._held = ""
        self.is_over = False

    def split(self, text: str) -> tuple[str, str]:
        """Return what belongs to the thinking, and what comes after it."""
        if self.is_over:
            return "", text
        if not self._is_open:
            text = self._held + text
            visible = text.lstrip()
            if (
                self._opening.startswith(visible)
                and visible != self._opening
                and self._is_near(text, visible)
            ):
                self._held = text
                return "", ""
            self._held = ""
            if not visible.startswith(self._opening) or not self._is_near(text, visible):
                self.is_over = True
                return "", text
            self._is_open = True
        return self._until_closing(text)

    def finish(self) -> str:
        """Return text held back for a thinking that never opened."""
        if self._is_open:
            return ""
        held, self._held = self._held, ""
        return held

    def _is_near(self, text: str, visible: str) -> bool:
        return len(text) - len(visible) <= self.MOST_SPACE

    def _until_closing(self, text: str) -> tuple[str, str]:
        """Split at the end of the closing string. The end of the text is kept, as that may begin within it."""
        seen = self._held + text
        start = seen.find(self._closing)
        if start < 0:
            self._held = seen[max(len(seen) - len(self._closing) + 1, 0) :]
            return text, ""
        self.is_over = True
        cut = start + len(self._closing) - len(self._held)
        return text[:cut], text[cut:]
