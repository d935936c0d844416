"""A decoder of server-sent events, from bytes in pieces of any size. It knows nothing of HTTP.

It follows https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation, without ``id`` and
``retry``: a completion cannot be resumed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Event:
    """An event: its ``data`` lines, joined by line breaks, and its type."""

    data: str
    event: str = "message"

    @property
    def is_done(self) -> bool:
        """Whether this event ends a stream of OpenAI's API."""
        return self.data == "[DONE]"


class SSEDecoder:
    """A decoder of bytes into events. An event that lacks its closing blank line at the stream's end is dropped."""

    def __init__(self) -> None:
        self._partial: list[bytes] = []
        self._after_carriage_return = False
        self._at_start = True
        self._data: list[str] = []
        self._event = ""

    def feed(self, data: bytes) -> list[Event]:
        """Return the events that ``data`` completes."""
        events = map(self._take, self._lines(data))
        return [event for event in events if event is not None]

    def _lines(self, data: bytes) -> Iterator[bytes]:
        """Yield complete lines without their ends. Each byte is read once, in however many pieces a line comes."""
        if self._after_carriage_return and data:
            self._after_carriage_return = False
            data = data.removeprefix(b"\n")
        for piece in data.splitlines(keepends=True):
            line = piece.rstrip(b"\r\n")
            self._partial.append(line)
            if len(line) == len(piece):
                return
            # A carriage return ends the line. A line feed at the start of the next piece belongs to it.
            self._after_carriage_return = piece.endswith(b"\r")
            whole = b"".join(self._partial)
            self._partial.clear()
            yield whole

    def _take(self, line: bytes) -> Event | None:
        if self._at_start:
            self._at_start = False
            line = line.removeprefix(BYTE_ORDER_MARK)
        if not line:
            return self._dispatch()
        name, _, value = line.partition(b":")
        text = value.removeprefix(b" ").decode("utf-8", "replace")
        if name == b"data":
            self._data.append(text)
        elif name == b"event":
            self._event = text
        return None

    def _dispatch(self) -> Event | None:
        event = Event("\n".join(self._data), self._event or "message") if self._data else None
        self._data = []
        self._event = ""
        return event
