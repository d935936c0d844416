"""A request and its answer on an HTTP/1 connection."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from logitserve.errors import ApiError

if TYPE_CHECKING:
    from uvicorn._types import ASGIReceiveEvent, ASGISendEvent


class Exchange(RequestResponseCycle):
    """uvicorn's exchange with a body that can fail, by a timeout or as invalid HTTP.

    An answer before a body that waits for `100 Continue` ends the connection: whether the body comes is the client's choice.
    """

    _fault: ApiError | None = None
    _is_told = False

    def fail(self, fault: ApiError) -> None:
        """End the body with an error. The connection ends with the answer."""
        self._fault = fault
        self.keep_alive = False
        self.message_event.set()

    async def send(self, message: ASGISendEvent) -> None:
        if self.waiting_for_100_continue:
            self.keep_alive = False
        await super().send(message)

    async def receive(self) -> ASGIReceiveEvent:
        """Return the next piece of the body.

        Raises the body's fault once; after that the client counts as gone.
        """
        if not self._is_told:
            message = await super().receive()
            if self._fault is None or message["type"] == "http.disconnect":
                return message
            self._is_told = True
            if not self.response_started:
                raise self._fault
        return {"type": "http.disconnect"}


class Http10Exchange(Exchange):
    """An exchange with an HTTP/1.0 client, which knows no chunks.

    An answer without a length ends with the connection.

    uvicorn frames such an answer in chunks unless it has a length. So each piece gets its own length, as if
    there were no others.
    """

    _has_length = False

    async def send(self, message: ASGISendEvent) -> None:
        # The types of a message's keys depend on its "type", which mypy cannot follow here.
        event: Any = message
        if event["type"] == "http.response.start":
            self._has_length = any(name.lower() == b"content-length" for name, _ in event.get("headers", ()))
            if not self._has_length:
                self.chunked_encoding = False
        elif not self._has_length:
            self.expected_content_length = len(event.get("body", b""))
        await super().send(message)
