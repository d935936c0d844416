"""Both clients' IO: what reaches the wire, and what is closed when."""

from __future__ import annotations

import inspect
import json
from collections.abc import AsyncIterator, Iterator

import httpx
import pytest
from logitclient import AsyncClient, Client, DecodeError, StreamError, TransportError

CHUNK = b'data: {"choices": [{"index": 0, "text": "a", "finish_reason": null}]}\n\n'


class Body(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A response body that counts what was read of it and notes that it was closed."""

    def __init__(self, pieces: list[bytes], error: Exception | None = None) -> None:
        self._pieces = pieces
        self._error = error
        self.num_read = 0
        self.is_closed = False

    def __iter__(self) -> Iterator[bytes]:
        for piece in self._pieces:
            self.num_read += 1
            yield piece
        if self._error is not None:
            raise self._error

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self:
            yield piece

    def close(self) -> None:
        self.is_closed = True

    async def aclose(self) -> None:
        self.is_closed = True


def serving(body: Body, media_type: str = "text/event-stream") -> httpx.MockTransport:
    headers = {"Content-Type": media_type}
    return httpx.MockTransport(lambda _request: httpx.Response(200, stream=body, headers=headers))


def seen(**options: object) -> httpx.Request:
    """The request that ``models()`` sends."""
    requests: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        return httpx.Response(200, json={"data": []})

    with Client(transport=httpx.MockTransport(answer), **options) as client:  # type: ignore[arg-type]
        client.models()
    (request,) = requests
    return request


@pytest.mark.parametrize(
    "base_url", ["http://host:1", "http://host:1/", "http://host:1/v1", "http://host:1/v1/"]
)
def test_the_address_may_end_as_openais_do(base_url: str) -> None:
    assert str(seen(base_url=base_url).url) == "http://host:1/v1/models"


def test_a_path_before_the_api_is_kept() -> None:
    assert str(seen(base_url="https://host/llm/v1").url) == "https://host/llm/v1/models"


def test_the_key_is_a_bearer_key() -> None:
    assert seen(api_key="secret").headers["Authorization"] == "Bearer secret"
    assert "Authorization" not in seen().headers


def test_the_timeout_is_the_requests() -> None:
    assert seen(timeout=3.0).extensions["timeout"] == {"connect": 3.0, "read": 3.0, "write": 3.0, "pool": 3.0}
    assert seen().extensions["timeout"]["read"] == 600.0
    assert seen(timeout=None).extensions["timeout"]["read"] is None


def test_a_body_is_json() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        assert request.headers["Content-Type"] == "application/json"
        assert request.headers["Accept"] == "application/json"
        assert json.loads(request.content) == {"input": "é"}
        return httpx.Response(200, json={"data": []})

    with Client(transport=httpx.MockTransport(answer)) as client:
        client.perplexity("é")


@pytest.mark.anyio
async def test_a_client_that_was_given_stays_open() -> None:
    with httpx.Client() as http:
        Client(http_client=http).close()
        assert not http.is_closed
    async with httpx.AsyncClient() as async_http:
        await AsyncClient(http_client=async_http).close()
        assert not async_http.is_closed


@pytest.mark.anyio
async def test_a_client_and_a_transport_exclude_each_other() -> None:
    transport = httpx.MockTransport(lambda _request: httpx.Response(200))
    with httpx.Client() as http, pytest.raises(TypeError, match="exclude"):
        Client(http_client=http, transport=transport)
    async with httpx.AsyncClient() as async_http:
        with pytest.raises(TypeError, match="exclude"):
            AsyncClient(http_client=async_http, transport=transport)


@pytest.mark.anyio
async def test_leaving_a_stream_early_closes_it() -> None:
    body = Body([CHUNK] * 9)
    with Client(transport=serving(body)) as client, client.stream_complete("a") as stream:
        for chunk in stream:
            assert chunk.text == "a"
            break
    assert body.is_closed
    assert body.num_read == 1

    body = Body([CHUNK] * 9)
    async with AsyncClient(transport=serving(body)) as client_, client_.stream_complete("a") as stream_:
        async for chunk in stream_:
            assert chunk.text == "a"
            break
    assert body.is_closed
    assert body.num_read == 1


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (Body([CHUNK, b"data: {\n\n", CHUNK]), DecodeError),
        (Body([CHUNK], httpx.RemoteProtocolError("cut")), TransportError),
        (Body([CHUNK]), StreamError),
    ],
)
@pytest.mark.anyio
async def test_a_stream_that_fails_is_closed(body: Body, kind: type[Exception]) -> None:
    with Client(transport=serving(body)) as client, client.stream_complete("a") as stream:
        assert next(iter(stream)).text == "a"
        with pytest.raises(kind):
            list(stream)
        assert body.is_closed
    body.is_closed = False
    async with (
        AsyncClient(transport=serving(body)) as async_client,
        async_client.stream_complete("a") as async_stream,
    ):
        parts = aiter(async_stream)
        assert (await anext(parts)).text == "a"
        with pytest.raises(kind):
            await anext(parts)
        assert body.is_closed


@pytest.mark.anyio
async def test_a_stream_of_another_type_is_none() -> None:
    body = Body([CHUNK])
    portal = serving(body, "text/html; charset=utf-8")
    with Client(transport=portal) as client, client.stream_arrow("a") as stream:
        with pytest.raises(DecodeError, match="/v1/logits with 'text/html'"):
            list(stream)
        assert body.is_closed
    body.is_closed = False
    async with AsyncClient(transport=portal) as async_client, async_client.stream_arrow("a") as async_stream:
        with pytest.raises(DecodeError, match="/v1/logits with 'text/html'"):
            await anext(aiter(async_stream))
        assert body.is_closed
    assert body.num_read == 0


@pytest.mark.anyio
async def test_an_answer_that_breaks_off_is_closed() -> None:
    body = Body([b"{"], httpx.ReadError("cut"))
    with Client(transport=serving(body)) as client, pytest.raises(TransportError):
        client.models()
    assert body.is_closed
    body.is_closed = False
    async with AsyncClient(transport=serving(body)) as async_client:
        with pytest.raises(TransportError):
            await async_client.models()
    assert body.is_closed


@pytest.mark.anyio
async def test_nothing_is_sent_before_a_stream_is_entered() -> None:
    def refuse(_request: httpx.Request) -> httpx.Response:
        raise AssertionError

    with Client(transport=httpx.MockTransport(refuse)) as client:
        stream = client.stream_chat([])
        with pytest.raises(RuntimeError, match="with statement"):
            iter(stream)
    async with AsyncClient(transport=httpx.MockTransport(refuse)) as async_client:
        async_stream = async_client.stream_chat([])
        with pytest.raises(RuntimeError, match="with statement"):
            aiter(async_stream)


def test_a_stream_is_entered_once() -> None:
    with Client(transport=serving(Body([CHUNK]))) as client:
        stream = client.stream_complete("a")
        with stream:
            pass
        with pytest.raises(RuntimeError, match="once"):
            stream.__enter__()


def test_both_clients_have_the_same_calls() -> None:
    def calls(client: type) -> dict[str, object]:
        return {
            name: inspect.signature(method).parameters
            for name, method in vars(client).items()
            if not name.startswith("_")
        }

    assert calls(Client) == calls(AsyncClient)
