"""Templates of paths and names of methods: a small set, whatever clients ask for."""

from __future__ import annotations

from collections.abc import Sequence

from starlette._utils import get_route_path
from starlette.routing import BaseRoute, Route
from starlette.types import Scope

OTHER = "other"
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class RouteNames:
    """The app's routes by path."""

    def __init__(self, routes: Sequence[BaseRoute]) -> None:
        own = [route for route in routes if isinstance(route, Route)]
        self._paths = frozenset(route.path for route in own if not route.param_convertors)
        self._patterns = [route for route in own if route.param_convertors]

    def of(self, scope: Scope) -> str:
        """Return the template that the request's path fits, or "other"."""
        path = get_route_path(scope)
        if path in self._paths:
            return path
        fitting = (route.path for route in self._patterns if route.path_regex.match(path))
        return next(fitting, OTHER)


def method_name(scope: Scope) -> str:
    """Return the request's method if it is a usual one, else "other". A WebSocket's handshake is a GET."""
    method: str = scope.get("method", "GET")
    return method if method in METHODS else OTHER
