"""What goes wrong is told by type."""

from __future__ import annotations

import httpx
import pytest
from logitclient import (
    APIError,
    AsyncClient,
    AuthenticationError,
    BadRequestError,
    Client,
    DecodeError,
    LogitClientError,
    NotFoundError,
    PayloadTooLargeError,
    RateLimitError,
    RequestTimeoutError,
    ServerError,
    ServiceUnavailableError,
    TransportError,
    errors,
)

KINDS = [
    (307, APIError),
    (400, BadRequestError),
    (401, AuthenticationError),
    (403, AuthenticationError),
    (404, NotFoundError),
    (413, PayloadTooLargeError),
    (418, APIError),
    (429, RateLimitError),
    (500, ServerError),
    (502, ServerError),
    (503, ServiceUnavailableError),
]


def raised(response: httpx.Response) -> APIError:
    transport = httpx.MockTransport(lambda _request: response)
    with Client(transport=transport, max_retries=0) as client, pytest.raises(APIError) as caught:
        client.models()
    return caught.value


@pytest.mark.parametrize(("status", "kind"), KINDS)
def test_a_status_has_its_class_and_the_error_its_members(status: int, kind: type[APIError]) -> None:
    body = {"error": {"message": "no", "type": "some_error", "param": "top_k", "code": "c"}}
    error = raised(httpx.Response(status, json=body, headers={"X-Request-Id": "r-1", "Retry-After": "7"}))
    assert type(error) is kind
    assert (error.status, error.message, error.type, error.param, error.code) == (
        status,
        "no",
        "some_error",
        "top_k",
        "c",
    )
    assert (error.request_id, error.retry_after) == ("r-1", 7.0)
    assert str(error) == f"{status}: no"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>a proxy</html>", "<html>a proxy</html>"),
        (b"", "Bad Gateway"),
        (b"[]", "[]"),
        (b'{"error": "text"}', '{"error": "text"}'),
        (b'{"error": {"message": 3}}', '{"error": {"message": 3}}'),
        (b"x" * 9000, "x" * 500),
    ],
)
def test_an_error_without_an_error_object_tells_what_came(content: bytes, message: str) -> None:
    error = raised(httpx.Response(502, content=content))
    assert error.message == message
    assert error.code is None


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (httpx.ConnectError("x"), TransportError),
        (httpx.ReadError("x"), TransportError),
        (httpx.RemoteProtocolError("x"), TransportError),
        (httpx.DecodingError("x"), TransportError),
        (httpx.ReadTimeout("x"), RequestTimeoutError),
        (httpx.ConnectTimeout(""), RequestTimeoutError),
        (httpx.PoolTimeout("x"), RequestTimeoutError),
    ],
)
@pytest.mark.anyio
async def test_httpxs_errors_are_ours(error: httpx.HTTPError, kind: type[TransportError]) -> None:
    def fail(_request: httpx.Request) -> httpx.Response:
        raise error

    with Client(transport=httpx.MockTransport(fail)) as client, pytest.raises(kind) as caught:
        client.models()
    assert type(caught.value) is kind
    assert str(caught.value)
    assert caught.value.__cause__ is error
    async with AsyncClient(transport=httpx.MockTransport(fail)) as async_client:
        with pytest.raises(kind):
            await async_client.models()


def test_an_address_that_is_none_is_a_transport_error() -> None:
    with Client("nowhere") as client, pytest.raises(TransportError):
        client.models()


def test_an_answer_that_is_no_answer_is_a_decode_error() -> None:
    transport = httpx.MockTransport(lambda _request: httpx.Response(200, content=b"<html>a portal</html>"))
    with Client(transport=transport) as client, pytest.raises(DecodeError, match="/v1/models"):
        client.models()


def test_every_error_is_in_the_tree() -> None:
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, Exception):
            assert issubclass(kind, LogitClientError)
            assert kind.__name__ in (errors.__doc__ or "")
