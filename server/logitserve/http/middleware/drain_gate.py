"""The gate that turns requests away while the server shuts down."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from logitserve.errors import not_ready
from logitserve.http.refusal import refuse
from logitserve.http.scope import is_probe, is_request
from logitserve.state import ServerState


class DrainGate:
    """Turns requests and WebSockets away while the running ones end."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._state.draining and is_request(scope) and not is_probe(scope):
            await refuse(not_ready("draining"), scope, receive, send)
            return
        await self._app(scope, receive, send)
