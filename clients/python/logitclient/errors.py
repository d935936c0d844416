"""The errors that a call can raise.

LogitClientError
├── APIError                          the server answered with an error status
│   ├── BadRequestError               400: a field is wrong; ``param`` names it
│   ├── AuthenticationError           401, 403
│   ├── NotFoundError                 404: unknown model, head or path
│   ├── PayloadTooLargeError          413
│   ├── RateLimitError                429: the queue is full
│   └── ServerError                   5xx
│       └── ServiceUnavailableError   503: loading, draining or restarting
├── TransportError                    no answer, or one that broke off
│   └── RequestTimeoutError           none in time
├── StreamError                       a stream carried an error, or ended before its end marker
├── DecodeError                       an answer does not have the API's shape
└── MissingDependencyError            an optional package is not installed
"""

from __future__ import annotations


class LogitClientError(Exception):
    """Base of every error of this package."""


class APIError(LogitClientError):
    """An error status, with the members of the answer's error object.

    ``retry_after`` is the wait in seconds that the server asked for.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str | None = None,  # noqa: A002 - the wire's name
        code: str | None = None,
        param: str | None = None,
        request_id: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status
        self.message = message
        self.type = type
        self.code = code
        self.param = param
        self.request_id = request_id
        self.retry_after = retry_after


class BadRequestError(APIError):
    """400: the request is at fault; ``param`` names the field."""


class AuthenticationError(APIError):
    """401 or 403: no API key was sent, or one that the server does not know."""


class NotFoundError(APIError):
    """404: an unknown model, head or path."""


class PayloadTooLargeError(APIError):
    """413: the request's body is over the server's limit."""


class RateLimitError(APIError):
    """429: the server's queue is full."""


class ServerError(APIError):
    """5xx: the server is at fault."""


class ServiceUnavailableError(ServerError):
    """503: the server is loading, draining or restarting its engine."""


class TransportError(LogitClientError):
    """The connection could not be made, or broke."""


class RequestTimeoutError(TransportError):
    """The server did not answer within the client's ``timeout``."""


class StreamError(LogitClientError):
    """A stream carried an error event, or ended without its end marker."""

    def __init__(
        self,
        message: str,
        *,
        type: str | None = None,  # noqa: A002 - the wire's name
        code: str | None = None,
        param: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.type = type
        self.code = code
        self.param = param


class DecodeError(LogitClientError):
    """An answer lacks a member, or has numbers that do not fit its own shape and dtype."""


class MissingDependencyError(LogitClientError):
    """An optional package is needed. ``extra`` names the extra that brings it."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed: pip install 'logitclient[{extra}]'")
        self.package = package
        self.extra = extra


BY_STATUS: dict[int, type[APIError]] = {
    400: BadRequestError,
    401: AuthenticationError,
    403: AuthenticationError,
    404: NotFoundError,
    413: PayloadTooLargeError,
    429: RateLimitError,
    503: ServiceUnavailableError,
}


def class_of_status(status: int) -> type[APIError]:
    """Return the class of error for an HTTP status."""
    return BY_STATUS.get(status, ServerError if status >= 500 else APIError)
