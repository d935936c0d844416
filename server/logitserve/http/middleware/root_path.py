"""The prefix under which a proxy offers this server, whether or not the proxy takes it off the path."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from logitserve.http.scope import is_request


class RootPath:
    """Settles the paths of a request: ``root_path`` is the prefix, and ``path`` begins with it, as ASGI has it.

    Every gate and the router then take the prefix off once, so that a path means the same to all of them.
    """

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self._app = app
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        root_path = self._root_path
        if is_request(scope):
            path = scope["path"]
            if path != root_path and not path.startswith(f"{root_path}/"):
                path = root_path + path
            scope = {**scope, "path": path, "root_path": root_path}
        await self._app(scope, receive, send)
