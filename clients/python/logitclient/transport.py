"""HTTP that both clients share: addresses, headers and errors."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from logitclient.errors import APIError, DecodeError, RequestTimeoutError, TransportError, class_of_status
from logitclient.operations import Request
from logitclient.retries import parse_retry_after

Timeout = float | httpx.Timeout | None

DEFAULT_TIMEOUT = httpx.Timeout(600.0, connect=5.0)
"""Long for an answer, which takes as long as its tokens do, and short for a connection."""

LONGEST_MESSAGE = 500


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server's address, key and timeout. ``base_url`` may end in OpenAI's /v1."""

    base_url: str
    api_key: str | None
    timeout: Timeout

    def build(self, http: httpx.Client | httpx.AsyncClient, request: Request) -> httpx.Request:
        """Return the request as httpx sends it."""
        headers = {"Accept": request.accept}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        content = request.content
        if content is not None:
            headers["Content-Type"] = "application/json"
        url = self.base_url.rstrip("/").removesuffix("/v1") + request.path
        return http.build_request(request.method, url, headers=headers, content=content, timeout=self.timeout)


def check_injection(http_client: object, transport: object) -> None:
    """Check that not both are given. Raises TypeError, since a client has its transport already."""
    if http_client is not None and transport is not None:
        raise TypeError("http_client and transport exclude each other")


@contextlib.contextmanager
def translate_errors() -> Iterator[None]:
    """Raise our errors in the place of httpx's."""
    try:
        yield
    except httpx.TimeoutException as error:
        raise RequestTimeoutError(str(error) or type(error).__name__) from error
    except (httpx.RequestError, httpx.InvalidURL) as error:
        raise TransportError(str(error) or type(error).__name__) from error


def check_media_type(response: httpx.Response, request: Request) -> None:
    """Check a successful response's type. Raises DecodeError where it is not the request's."""
    media_type = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != request.accept:
        raise DecodeError(f"the server answered {request.path} with {media_type!r}, not {request.accept!r}")


def api_error(response: httpx.Response) -> APIError:
    """Return the error of a response whose body was read. The body need not be an error object."""
    error = _error_object(response)
    message = error.get("message")
    return class_of_status(response.status_code)(
        response.status_code,
        message if isinstance(message, str) else response.text[:LONGEST_MESSAGE] or response.reason_phrase,
        type=error.get("type"),
        code=error.get("code"),
        param=error.get("param"),
        request_id=response.headers.get("x-request-id"),
        retry_after=parse_retry_after(response.headers.get("retry-after")),
    )


def _error_object(response: httpx.Response) -> dict[str, Any]:
    try:
        error = json.loads(response.content)["error"]
    except (ValueError, KeyError, TypeError):
        return {}
    return error if isinstance(error, dict) else {}
