"""Bytes of images: out of data: URLs, or fetched from hosts that the server's operator lists."""

from __future__ import annotations

import asyncio
import logging
import re
import socket
from collections.abc import Awaitable, Callable
from http.cookiejar import CookieJar, DefaultCookiePolicy

import httpx
import pybase64

from logitserve.errors import BadRequestError
from logitserve.images.hosts import ImageHosts, is_public

logger = logging.getLogger(__name__)

Resolve = Callable[[str, int], Awaitable[list[str]]]
"""Returns the IP addresses of a host's name and port. Raises OSError."""

Hold = Callable[[int], None]
"""Counts bytes that have come. Raises ApiError where there is no room for them."""

_DATA = re.compile(
    r"data:(?P<type>image/[\w.+-]{1,100})(?:;[\w.+-]{1,100}=[\w.+-]{1,100})*;base64,",
    re.ASCII | re.IGNORECASE,
)

_INLINE_BYTES = 1 << 20
"""Size of base64 up to which decoding it does not hold up the event loop."""

_PORTS = {"http": 80, "https": 443}


async def resolve(host: str, port: int) -> list[str]:
    """Return the addresses that the system's resolver gives for a name. Raises OSError."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


class ImageSources:
    """Reads the bytes that URLs of images stand for.

    A request may name any address, so a fetch is guarded: only listed hosts, resolved once, all of whose addresses are
    public; the connection goes to an address that was checked; no redirect is followed and no proxy is asked.

    Args:
        max_bytes: most bytes of one image.
        seconds: time for one fetch.
        resolve, is_public: how names become addresses, and which of these may be connected to.
    """

    def __init__(
        self,
        hosts: ImageHosts,
        max_bytes: int,
        seconds: float,
        *,
        resolve: Resolve = resolve,
        is_public: Callable[[str], bool] = is_public,
    ) -> None:
        self._hosts = hosts
        self._max_bytes = max_bytes
        self._seconds = seconds
        self._resolve = resolve
        self._is_public = is_public
        self._client: httpx.AsyncClient | None = None
        if hosts:
            self._client = httpx.AsyncClient(
                trust_env=False,
                follow_redirects=False,
                timeout=seconds,
                cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
                limits=httpx.Limits(max_keepalive_connections=0),
                headers={"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "logitserve"},
            )

    async def read(self, url: str, param: str, hold: Hold) -> bytes:
        """Return an image's file. Raises BadRequestError, which names ``param``, and what ``hold`` raises."""
        if url[:5].lower() == "data:":
            return await self._from_data(url, param, hold)
        return await self._fetch(url, param, hold)

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()

    async def _from_data(self, url: str, param: str, hold: Hold) -> bytes:
        match = _DATA.match(url)
        if match is None:
            raise _invalid(param, "is a data: URL that is not of the form data:image/TYPE;base64,DATA")
        start = match.end()
        # Without line breaks, which are no part of a URL, base64 has four characters for three bytes.
        if (len(url) - start) // 4 * 3 - 2 > self._max_bytes:
            raise self._too_large(param)
        if len(url) > _INLINE_BYTES:
            data = await asyncio.to_thread(_decoded, url, start)
        else:
            data = _decoded(url, start)
        if data is None:
            raise _invalid(param, "is a data: URL whose data is not valid base64")
        if len(data) > self._max_bytes:
            raise self._too_large(param)
        hold(len(data))
        return data

    async def _fetch(self, text: str, param: str, hold: Hold) -> bytes:
        client = self._client
        if client is None:
            raise _invalid(
                param,
                "is no data: URL; this server fetches no images, as its option --image-hosts names no host. Send the image "
                "as data:image/TYPE;base64,DATA",
                "images_not_fetched",
            )
        url = _parsed(text, param)
        name = url.raw_host.decode("ascii").lower()
        port = _PORTS[url.scheme] if url.port is None else url.port
        if not self._hosts.allows(name, port):
            raise _invalid(
                param, "names a host or a port that --image-hosts does not list", "image_host_not_allowed"
            )
        try:
            async with asyncio.timeout(self._seconds):
                address = await self._checked_address(name, port)
                response = await self._get(client, url, name, address)
                try:
                    return await self._file(response, param, hold)
                finally:
                    await response.aclose()
        except TimeoutError:
            raise self._too_slow(param) from None
        except httpx.TimeoutException:
            raise self._too_slow(param) from None
        except (httpx.HTTPError, OSError) as error:
            logger.info("an image could not be fetched: %s", type(error).__name__)
            raise _not_fetched(param, "could not be fetched") from None

    async def _checked_address(self, name: str, port: int) -> str:
        """Return the address to connect to. Raises OSError, also where any of the name's addresses is not public."""
        addresses = await self._resolve(name, port)
        if not addresses or not all(map(self._is_public, addresses)):
            raise OSError("no address, or one that is not public")
        return addresses[0]

    async def _get(
        self, client: httpx.AsyncClient, url: httpx.URL, name: str, address: str
    ) -> httpx.Response:
        """Return the head of the answer; its body is still to come."""
        # The server's certificate is checked against the name, and the connection goes to the address.
        request = client.build_request(
            "GET",
            url.copy_with(host=address, fragment=None),
            headers={"Host": url.netloc.decode("ascii")},
            extensions={"sni_hostname": name},
        )
        return await client.send(request, stream=True)

    async def _file(self, response: httpx.Response, param: str, hold: Hold) -> bytes:
        """Return the body, counted as it comes. Raises BadRequestError for an answer that is no whole file."""
        if response.is_redirect:
            raise _not_fetched(param, "leads to a redirect, which is not followed")
        if response.status_code != httpx.codes.OK:
            raise _not_fetched(param, f"could not be fetched: its server answered {response.status_code}")
        if response.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise _not_fetched(param, "could not be fetched: its server compressed the file")
        declared = response.headers.get("Content-Length", "")
        if declared.isdigit() and int(declared) > self._max_bytes:
            raise self._too_large(param)
        data = bytearray()
        async for piece in response.aiter_raw():
            hold(len(piece))
            data += piece
            if len(data) > self._max_bytes:
                raise self._too_large(param)
        return bytes(data)

    def _too_large(self, param: str) -> BadRequestError:
        return _invalid(
            param, f"is an image of more than {self._max_bytes} bytes (--max-image-bytes)", "image_too_large"
        )

    def _too_slow(self, param: str) -> BadRequestError:
        return _not_fetched(
            param,
            f"took more than {self._seconds:g} s to fetch (--image-fetch-timeout)",
            "image_fetch_timeout",
        )


def _decoded(url: str, start: int) -> bytes | None:
    try:
        return pybase64.b64decode(url[start:], validate=True)
    except ValueError:
        return None


def _parsed(text: str, param: str) -> httpx.URL:
    """Return the URL that is checked and connected to. Raises BadRequestError."""
    try:
        url = httpx.URL(text)
    except (httpx.InvalidURL, ValueError):
        raise _invalid(param, "is no valid URL") from None
    if url.scheme not in _PORTS:
        raise _invalid(param, "is neither a data: URL nor one of http or https")
    if url.userinfo or not url.host:
        raise _invalid(param, "is a URL with a user or without a host")
    return url


def _invalid(param: str, fault: str, code: str = "invalid_image_url") -> BadRequestError:
    return BadRequestError(f"'{param}' {fault}.", param=param, code=code)


def _not_fetched(param: str, fault: str, code: str = "image_not_fetched") -> BadRequestError:
    return _invalid(param, fault, code)
