"""No requests while the server ends."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from logitserve.errors import not_ready
from logitserve.http.scope import OPEN_PATHS
from logitserve.state import ServerState


class DrainGate:
    """Turns requests away while the running ones end."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._state.draining and scope["path"] not in OPEN_PATHS:
            await not_ready("draining").response()(scope, receive, send)
            return
        await self._app(scope, receive, send)
