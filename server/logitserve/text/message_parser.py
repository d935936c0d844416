"""A TextParser for models that think and call functions."""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable, Collection, Sequence

from logitserve.text.families.readers import CallReader
from logitserve.text.message_parts import MessageParts
from logitserve.text.parser import TextPart, ToolCall
from logitserve.text.regions import Closing, Opening, Regions, RegionSyntax

_ALPHANUMERIC = string.ascii_letters + string.digits


def openai_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def mistral_id() -> str:
    """Return an id of nine letters and digits, as Mistral's chat templates demand it."""
    return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(9))


class MessageParser:
    """Cuts a text at its regions.

    A call is held back until it is whole. One that is malformed or cut is content, as the model wrote it, its
    delimiters included. White space that touches the thinking or a call is dropped.

    Args:
        turn: what the prompt has of the assistant's turn.
        reader: makes a reader of a call that opens.
        hidden: special tokens that content does not show.
    """

    def __init__(
        self,
        syntax: RegionSyntax,
        turn: str,
        *,
        reader: Callable[[Opening], CallReader],
        new_id: Callable[[], str],
        hidden: Collection[str],
    ) -> None:
        self._regions = Regions(syntax)
        self._new_reader = reader
        self._new_id = new_id
        self._reader: CallReader | None = None
        self._held: list[str] = []
        self._parts = MessageParts(hidden)
        self._num_calls = 0
        if turn and not turn.isspace():
            self._begin(turn)

    @property
    def in_reasoning(self) -> bool:
        region = self._regions.open
        return region is not None and region.kind == "reasoning"

    @property
    def has_calls(self) -> bool:
        return self._num_calls > 0

    @property
    def is_start(self) -> bool:
        """Whether the thinking may open yet."""
        return self._regions.is_start

    def push(self, text: str) -> Sequence[TextPart]:
        if not text:
            return ()
        self._regions.push(text)
        self._read(final=False)
        return self._parts.take()

    def finish(self) -> Sequence[TextPart]:
        self._read(final=True)
        region = self._regions.open
        if self._reader is not None and region is not None:
            self._end_call(self._reader, is_closed=region.ends_with_answer)
        self._parts.end()
        return self._parts.take()

    def _begin(self, turn: str) -> None:
        """Read what the prompt has of the answer, and forget it all but for the region that it ends in."""
        self._regions.push(turn)
        self._read(final=False)
        if self._reader is not None:
            self._reader = None
            self._regions.leave()
        self._regions.forget_unread()
        self._parts.forget()
        self._num_calls = 0

    def _read(self, *, final: bool) -> None:
        regions, parts = self._regions, self._parts
        while (event := regions.next(final=final)) is not None:
            match event:
                case Opening():
                    self._open(event)
                case Closing():
                    self._close(event)
                case _ if self._reader is not None:
                    self._read_call(self._reader, event.text)
                case _ if self.in_reasoning:
                    parts.reasoning(event.text)
                case _:
                    parts.content(event.text)

    def _open(self, opening: Opening) -> None:
        self._parts.pause()
        if opening.region.kind == "reasoning":
            self._parts.border()
        elif opening.region.kind == "mark" and not (self.has_calls and self._parts.is_at_border):
            self._parts.content(opening.text)
        elif opening.region.kind == "call":
            self._reader = reader = self._new_reader(opening)
            self._held = [opening.text]
            if opening.text == "{":
                reader.push(opening.text)  # bare JSON is opened by its own beginning

    def _close(self, closing: Closing) -> None:
        reader = self._reader
        if reader is not None and reader.in_string:
            self._regions.stay(closing.region)
            self._read_call(reader, closing.text)
        elif reader is not None:
            self._held.append(closing.text)
            self._end_call(reader, is_closed=True)
        elif closing.region.kind == "reasoning":
            self._parts.border()
        elif closing.region.kind == "call":
            self._parts.content(closing.text)
        else:
            self._parts.pause()

    def _read_call(self, reader: CallReader, text: str) -> None:
        end = reader.push(text)
        if end is not None and not reader.is_refuted:
            self._held.append(text[:end])
            self._regions.leave(text[end:])
            self._end_call(reader, is_closed=True)
            return
        self._held.append(text)
        if reader.is_refuted:
            self._give_back()

    def _end_call(self, reader: CallReader, *, is_closed: bool) -> None:
        calls = reader.calls() if is_closed else None
        if calls is None:
            self._give_back()
            return
        self._reader = None
        for name, arguments in calls:
            self._parts.call(ToolCall(self._num_calls, self._new_id(), name, arguments))
            self._num_calls += 1

    def _give_back(self) -> None:
        """Give what was taken for a call as content."""
        self._reader = None
        self._parts.content("".join(self._held))
