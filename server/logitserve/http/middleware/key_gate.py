"""The gate that refuses requests without an API key."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from logitserve.access.caller import Caller
from logitserve.access.keys import KeyRing
from logitserve.errors import ApiError
from logitserve.http.refusal import refuse
from logitserve.http.scope import header, is_probe, is_request


class KeyGate:
    """Requires a key on every path but the probes, if keys are configured.

    Puts the key's Caller into the scope.
    """

    def __init__(self, app: ASGIApp, keys: KeyRing) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if is_request(scope):
            caller = self._caller(scope)
            if caller is None:
                await refuse(_no_key(), scope, receive, send)
                return
            caller.enter(scope)
        await self._app(scope, receive, send)

    def _caller(self, scope: Scope) -> Caller | None:
        """Return the request's caller, or None when the request must not pass."""
        if self._keys.is_empty or is_probe(scope):
            return Caller()
        candidates = [header(scope, b"x-api-key").strip()]
        scheme, _, bearer = header(scope, b"authorization").partition(b" ")
        if scheme.lower() == b"bearer":
            candidates.append(bearer.strip())
        tenant = self._keys.find(candidates)
        return None if tenant is None else Caller(tenant)


def _no_key() -> ApiError:
    return ApiError(
        401,
        "A valid API key is needed (--api-key, --api-key-file): send 'Authorization: Bearer KEY' or 'x-api-key: KEY'.",
        headers={"WWW-Authenticate": "Bearer"},
    )
