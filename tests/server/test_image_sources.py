"""Where images come from: data: URLs, and hosts that the operator lists, behind guards that no address gets around."""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from logitserve.config import ServerConfig
from logitserve.errors import BadRequestError
from logitserve.images.hosts import ImageHosts, is_public
from logitserve.images.sources import ImageSources
from pydantic import ValidationError

pytestmark = pytest.mark.anyio

PARAM = "messages[0].content[1].image_url"
PNG = b"\x89PNG\r\n\x1a\nnot really"

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def ignore(_nbytes: int) -> None:
    """Count nothing."""


def sources(hosts: list[str] | None = None, *, max_bytes: int = 1000, seconds: float = 30.0) -> ImageSources:
    return ImageSources(ImageHosts(hosts or []), max_bytes, seconds)


async def refusal(url: str, reader: ImageSources) -> BadRequestError:
    with pytest.raises(BadRequestError) as refused:
        await reader.read(url, PARAM, ignore)
    await reader.close()
    assert refused.value.param == PARAM
    assert refused.value.message.startswith(f"'{PARAM}' ")
    return refused.value


@pytest.mark.parametrize(
    "head", ["data:image/png;base64,", "DATA:image/svg+xml;BASE64,", "data:image/jpeg;charset=utf-8;base64,"]
)
async def test_a_data_url_is_its_own_file(head: str) -> None:
    assert await sources().read(head + base64.b64encode(PNG).decode(), PARAM, ignore) == PNG


@pytest.mark.parametrize(
    ("url", "fault"),
    [
        ("data:", "of the form"),
        ("data:image/png,abcd", "of the form"),
        ("data:image/png;base64", "of the form"),
        ("data:text/html;base64,YWJj", "of the form"),
        ("data:;base64,YWJj", "of the form"),
        ("data:image/png;base64,YW!j", "base64"),
        ("data:image/png;base64,YWJ", "base64"),
        ("data:image/png;base64,YW\nJj", "base64"),
        ("data:image/png;base64,YWJjé", "base64"),
        ("data:image/png;base64,YW Jj", "base64"),
    ],
)
async def test_a_malformed_data_url_is_refused(url: str, fault: str) -> None:
    assert fault in (await refusal(url, sources())).message


@pytest.mark.parametrize(
    ("size", "fits"), [(998, True), (999, True), (1000, True), (1001, False), (1002, False)]
)
async def test_a_data_url_may_hold_as_much_as_the_bound_says(size: int, fits: bool) -> None:
    url = "data:image/png;base64," + base64.b64encode(bytes(size)).decode()
    if fits:
        assert await sources().read(url, PARAM, ignore) == bytes(size)
    else:
        assert "1000 bytes (--max-image-bytes)" in (await refusal(url, sources())).message


async def test_a_large_data_url_is_whole() -> None:
    data = bytes(range(256)) * 8192
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    assert await sources(max_bytes=4 << 20).read(url, PARAM, ignore) == data


async def test_a_data_url_of_100_megabytes_is_refused_by_its_length() -> None:
    refused = await refusal("data:image/png;base64," + "!" * (100 << 20), sources(max_bytes=20 << 20))
    assert refused.code == "image_too_large"


@pytest.mark.parametrize(
    "url", ["http://images.example/a.png", "https://127.0.0.1/", "file:///etc/passwd", "a.png"]
)
async def test_without_listed_hosts_nothing_is_fetched(url: str) -> None:
    refused = await refusal(url, sources())
    assert "--image-hosts" in refused.message
    assert refused.code == "images_not_fetched"


@pytest.mark.parametrize(
    "url",
    [
        "http://other.example/a.png",
        "http://sub.images.example/a.png",
        "http://images.example.evil.example/a.png",
        "http://images.example./a.png",
        "http://images.example:8080/a.png",
        "http://images.example:0/a.png",
        "https://images.example:22/a.png",
        "http://other.example:8443/",
        "http://ported.example/",
        "http://127.0.0.1/",
        "http://[::1]/",
        "http://[::ffff:10.0.0.1]/",
        "http://169.254.169.254/latest/meta-data/",
        "http://2130706433/",
        "http://0x7f.1/",
        "http://127.1/",
        "http://localhost/",
        "http://other.example#@images.example/",
        "http://other.example/?@images.example/",
        "http://\u0131mages.example/",
    ],
)
async def test_a_host_or_port_that_is_not_listed_is_refused(url: str) -> None:
    refused = await refusal(url, sources(["images.example", "ported.example:8443"]))
    assert refused.code == "image_host_not_allowed", refused.message
    assert "--image-hosts" in refused.message


@pytest.mark.parametrize(
    "url",
    [
        "http://0177.0.0.1/",
        "ftp://images.example/a.png",
        "file:///etc/passwd",
        "gopher://images.example/",
        "//images.example/a.png",
        "images.example/a.png",
        "http:///a.png",
        "http://images.example@169.254.169.254/",
        "http://user@images.example/",
        "http://user:word@images.example/",
        "http://images.example\\@169.254.169.254/",
        "http://images.example:99999/",
        "http://images.example:port/",
        "http://ima ges.example/",
        "http://images.example\r\nHost: other.example/",
        "http://[::1/",
        " http://images.example/",
    ],
)
async def test_a_url_of_another_form_is_refused(url: str) -> None:
    refused = await refusal(url, sources(["images.example"]))
    assert refused.code in ("invalid_image_url", "image_host_not_allowed"), refused.message


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "0.0.0.0",  # noqa: S104 - as an address to connect to
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "100.64.0.1",
        "169.254.169.254",
        "192.0.2.1",
        "198.18.0.1",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "fe80::1",
        "fe80::1%eth0",
        "fc00::1",
        "ff02::1",
        "2001:db8::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
        "2001:0:7f00:1::1",
        "images.example",
        "",
    ],
)
async def test_addresses_that_are_not_public_are_told(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["1.1.1.1", "93.184.216.34", "2606:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101"]
)
async def test_public_addresses_are_told(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize("addresses", [[], ["10.0.0.1"], ["1.1.1.1", "127.0.0.1"], ["::ffff:10.0.0.1"]])
async def test_a_listed_name_is_not_fetched_unless_all_its_addresses_are_public(addresses: list[str]) -> None:
    async def resolve(_host: str, _port: int) -> list[str]:
        return addresses

    reader = ImageSources(ImageHosts(["images.example"]), 1000, 30.0, resolve=resolve)
    refused = await refusal("http://images.example/a.png", reader)
    assert refused.message == f"'{PARAM}' could not be fetched."


@pytest.mark.parametrize("host", ["2130706433", "127.1", "127.0.0.1", "localhost"])
async def test_a_listed_name_of_this_machine_is_not_fetched(host: str) -> None:
    refused = await refusal(f"http://{host}/a.png", sources([host]))
    assert refused.message == f"'{PARAM}' could not be fetched."


class LoopbackHost:
    """A server on loopback that has the name images.example, and what it was asked."""

    def __init__(self, port: int, requests: list[bytes]) -> None:
        self.requests = requests
        self.resolved: list[tuple[str, int]] = []
        self.url = f"http://images.example:{port}/a.png?size=1"
        self._port = port
        self._resolve_always = False

    async def _resolve(self, host: str, port: int) -> list[str]:
        self.resolved.append((host, port))
        return ["127.0.0.1"] if len(self.resolved) == 1 or self._resolve_always else ["10.0.0.1"]

    def sources(self, *, seconds: float = 30.0, resolve_always: bool = False) -> ImageSources:
        """Return sources for which the name is another's once it has been resolved, unless ``resolve_always``."""
        self._resolve_always = resolve_always
        return ImageSources(
            ImageHosts([f"images.example:{self._port}"]),
            1000,
            seconds,
            resolve=self._resolve,
            is_public=lambda address: address == "127.0.0.1",
        )


@contextlib.asynccontextmanager
async def loopback(answer: Answer) -> AsyncIterator[LoopbackHost]:
    requests: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests.append(await reader.readuntil(b"\r\n\r\n"))
        with contextlib.suppress(ConnectionError):
            await answer(reader, writer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield LoopbackHost(server.sockets[0].getsockname()[1], requests)
    finally:
        server.close()


def says(content: bytes) -> Answer:
    async def answer(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(content)
        await writer.drain()

    return answer


def ok(body: bytes, *headers: str) -> bytes:
    head = "\r\n".join(["HTTP/1.1 200 OK", "Connection: close", *headers])
    return head.encode() + b"\r\n\r\n" + body


async def test_an_image_is_fetched_from_the_address_that_was_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    async with loopback(says(ok(PNG))) as host:
        reader = host.sources()
        assert await reader.read(host.url, PARAM, ignore) == PNG
        await reader.close()
    assert len(host.resolved) == 1
    assert host.resolved[0][0] == "images.example"
    (request,) = host.requests
    head = request.decode().splitlines()
    assert head[0] == "GET /a.png?size=1 HTTP/1.1"
    assert f"Host: {host.url.split('/')[2]}" in head


async def test_bytes_are_counted_as_they_come() -> None:
    counted: list[int] = []
    async with loopback(says(ok(PNG))) as host:
        reader = host.sources()
        await reader.read(host.url, PARAM, counted.append)
        await reader.read("data:image/png;base64,YWJj", PARAM, counted.append)
        await reader.close()
    assert sum(counted) == len(PNG) + 3


async def test_no_room_ends_a_fetch() -> None:
    def refuse(_nbytes: int) -> None:
        raise BadRequestError("no room")

    async with loopback(says(ok(PNG))) as host:
        reader = host.sources()
        with pytest.raises(BadRequestError, match="no room"):
            await reader.read(host.url, PARAM, refuse)
        await reader.close()


async def test_no_cookie_is_kept_for_the_next_request() -> None:
    async with loopback(says(ok(PNG, "Set-Cookie: who=one; Path=/"))) as host:
        reader = host.sources(resolve_always=True)
        for _ in range(2):
            await reader.read(host.url, PARAM, ignore)
        await reader.close()
    assert len(host.requests) == 2
    assert b"who=one" not in host.requests[1]


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "307 Temporary Redirect"])
async def test_a_redirect_is_not_followed(status: str) -> None:
    redirect = f"HTTP/1.1 {status}\r\nLocation: http://169.254.169.254/\r\nContent-Length: 0\r\n\r\n".encode()
    async with loopback(says(redirect)) as host:
        refused = await refusal(host.url, host.sources())
    assert "redirect" in refused.message
    assert len(host.requests) == len(host.resolved) == 1


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "answered 404"),
        (b"HTTP/1.1 206 Partial Content\r\nContent-Length: 0\r\n\r\n", "answered 206"),
        (ok(PNG, "Content-Encoding: gzip"), "compressed"),
        (b"", "could not be fetched"),
        (b"SSH-2.0-OpenSSH\r\n", "could not be fetched"),
        (ok(b"x", "Content-Length: 5"), "could not be fetched"),
        (ok(b"", "Content-Length: 1001"), "--max-image-bytes"),
        (ok(bytes(1001)), "--max-image-bytes"),
    ],
)
async def test_an_answer_that_is_no_whole_image_within_the_bounds_is_refused(
    content: bytes, fault: str
) -> None:
    async with loopback(says(content)) as host:
        refused = await refusal(host.url, host.sources())
    assert fault in refused.message
    assert "127.0.0.1" not in refused.message


async def test_a_body_without_an_end_is_left_when_it_is_too_large() -> None:
    async def stream(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(ok(b""))
        while True:
            writer.write(bytes(512))
            await writer.drain()

    async with loopback(stream) as host:
        assert "--max-image-bytes" in (await refusal(host.url, host.sources())).message


@pytest.mark.parametrize("told", [b"", b"HTTP/1.1 200 OK\r\n", ok(b"x")])
async def test_a_server_that_falls_silent_is_left(told: bytes) -> None:
    over = asyncio.Event()

    async def silent(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(told)
        await writer.drain()
        await over.wait()

    async with loopback(silent) as host:
        refused = await refusal(host.url, host.sources(seconds=0.05))
        over.set()
    assert "--image-fetch-timeout" in refused.message
    assert refused.code == "image_fetch_timeout"


@pytest.mark.parametrize(
    "entry",
    [
        "https://images.example",
        "images.example/a",
        "*",
        "*.example",
        "images.example:0",
        "a:65536",
        "a:b",
        "[::1]",
        "bücher.example",
    ],
)
def test_a_value_of_image_hosts_that_is_no_host_ends_the_start(entry: str) -> None:
    with pytest.raises(ValidationError, match="no host"):
        ServerConfig(image_hosts=[entry])


async def test_hosts_are_listed_in_any_case_and_their_international_names_as_dns_has_them() -> None:
    hosts = ImageHosts(["Images.Example", "xn--bcher-kva.example"])
    assert hosts.allows("images.example", 80)
    assert hosts.allows("images.example", 443)
    reader = ImageSources(ImageHosts(["xn--bcher-kva.example"]), 1000, 30.0, resolve=_nowhere)
    assert (await refusal("http://BÜCHER.example/", reader)).code == "image_not_fetched"


async def _nowhere(_host: str, _port: int) -> list[str]:
    raise OSError
