"""The gate against web pages of other origins, and against pages whose host name was made to point here."""

from __future__ import annotations

import re

from fastapi.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from logitserve.access.origins import Host, Origin, OriginRules
from logitserve.config import ServerConfig
from logitserve.errors import ApiError
from logitserve.http.refusal import refuse
from logitserve.http.scope import header, headers, is_probe, is_request, reply_headers

METHODS = b"GET, HEAD, POST"
USUAL_HEADERS = b"authorization, content-type, x-api-key, x-request-id"
EXPOSED_HEADERS = b"x-request-id, retry-after, x-should-retry"
MAX_AGE_SECONDS = b"7200"
"""Time that a browser may remember a preflight's answer: Chromium's longest."""

HEADER_NAMES = re.compile(rb"[A-Za-z0-9!#$%&'*+.^_`|~ ,-]+")
LONGEST_TOLD = 100


class OriginGate:
    """Refuses foreign origins (403) and foreign hosts (421), answers preflights, and lets allowed pages read answers.

    Starlette's CORSMiddleware refuses no request, knows no origin as our own, and wraps every message of a stream.
    """

    def __init__(self, app: ASGIApp, config: ServerConfig, *, on_loopback: bool) -> None:
        """Take the rules.

        Without an Origin, Host is checked only ``on_loopback``, where no proxy gives other names.
        """
        self._app = app
        self._rules = OriginRules(config.cors_origin, config.allowed_host)
        self._admits_others = bool(config.cors_origin)
        self._on_loopback = on_loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not is_request(scope):
            await self._app(scope, receive, send)
            return
        origins = headers(scope, b"origin")
        if origins or self._admits_others:
            reply_headers(scope).append((b"vary", b"Origin"))
        try:
            host = _host(scope)
            self._check(scope, origins, host)
        except ApiError as error:
            await refuse(error, scope, receive, send)
            return
        if origins:
            reply_headers(scope).extend(
                [
                    (b"access-control-allow-origin", origins[0]),
                    (b"access-control-expose-headers", EXPOSED_HEADERS),
                ]
            )
            if scope["type"] == "http" and scope["method"] == "OPTIONS" and _asked(scope, b"method"):
                await _preflight_answer(scope)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope, origins: list[bytes], host: Host | None) -> None:
        """Raise ApiError unless the request may pass."""
        if len(origins) > 1:
            raise ApiError(400, "The request has more than one Origin header.", code="invalid_origin")
        if origins:
            origin = origins[0].decode("latin-1")
            if not self._rules.admits(origin, host):
                raise _foreign_origin(origin, host)
        elif (
            self._on_loopback and host is not None and not is_probe(scope) and not self._rules.is_known(host)
        ):
            raise ApiError(
                421,
                f"This server is not known as '{host.name[:LONGEST_TOLD]}': start it with --allowed-host "
                f"{host.name[:LONGEST_TOLD]}, or call it by its address or as localhost.",
            )


def _host(scope: Scope) -> Host | None:
    """Return the host that the request names, or None where a client older than HTTP/1.1 names none.

    Raises ApiError.
    """
    given = headers(scope, b"host")
    if len(given) > 1:
        raise ApiError(400, "The request has more than one Host header.", code="invalid_host")
    if not given or not given[0]:
        if scope["http_version"] == "1.1":
            raise ApiError(400, "The request has no Host header.", code="invalid_host")
        return None
    host = Host.parse(given[0].decode("latin-1"))
    if host is None:
        raise ApiError(400, "The Host header holds no host.", code="invalid_host")
    return host


def _foreign_origin(text: str, host: Host | None) -> ApiError:
    told, origin = text[:LONGEST_TOLD], Origin.parse(text)
    message = f"Pages of the origin '{told}' may not call this server: start it with --cors-origin {told} to let them"
    if origin is not None and host is not None and origin.name == host.name and not host.is_address:
        message += f", or with --allowed-host {host.name[:LONGEST_TOLD]} if that is its own name"
    return ApiError(403, f"{message}.")


def _asked(scope: Scope, what: bytes) -> bytes:
    """Return a preflight's ``Access-Control-Request-`` header, or nothing."""
    return header(scope, b"access-control-request-" + what)


def _preflight_answer(scope: Scope) -> Response:
    """Allow the request that the page is about to send.

    A key or a limit may still refuse it when it comes.
    """
    asked = _asked(scope, b"headers")
    reply_headers(scope).extend(
        [
            (b"access-control-allow-methods", METHODS),
            (b"access-control-allow-headers", asked if HEADER_NAMES.fullmatch(asked) else USUAL_HEADERS),
            (b"access-control-max-age", MAX_AGE_SECONDS),
            (b"vary", b"Access-Control-Request-Method, Access-Control-Request-Headers"),
        ]
    )
    if _asked(scope, b"private-network") == b"true":
        reply_headers(scope).append((b"access-control-allow-private-network", b"true"))
    return Response(status_code=204)
