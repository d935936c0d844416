"""The gate that lets nobody pass without an API key."""

from __future__ import annotations

import hmac

from starlette.types import ASGIApp, Receive, Scope, Send

from logitserve.config import ServerConfig
from logitserve.errors import ApiError
from logitserve.http.refusal import refuse
from logitserve.http.scope import header, is_probe, is_request


class KeyGate:
    """Asks for a bearer key everywhere but at the probes, where keys are configured."""

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self._app = app
        self._keys = [key.get_secret_value().encode() for key in config.api_key]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._keys or not is_request(scope) or is_probe(scope) or self._admits(scope):
            await self._app(scope, receive, send)
            return
        error = ApiError(
            401,
            "A valid API key is needed: send 'Authorization: Bearer KEY'.",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await refuse(error, scope, receive, send)

    def _admits(self, scope: Scope) -> bool:
        scheme, _, given = header(scope, b"authorization").partition(b" ")
        # Every key is compared, so that the time taken does not tell which one was near.
        matches = [hmac.compare_digest(given.strip(), key) for key in self._keys]
        return scheme.lower() == b"bearer" and any(matches)
