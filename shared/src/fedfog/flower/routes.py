"""Shorter ways through the SuperLink's HTTP server, which takes most of a small round.

Every request passes the eight middlewares of Flower's three APIs one after the other, each at
0.2 ms of the interpreter, although six of them do nothing for the paths of another API. Here those
are passed by: a fleet request meets four of them and a request of a ServerApp two, which takes a
sixth off a round.
"""

import flwr.superlink.main as superlink
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

# The paths that a middleware does anything for, by the beginning of its name.
_PATHS = {
    "Control": "/v1/control/",
    "NodeAuth": "/v1/fleet/",
    "FleetEventLog": "/v1/fleet/",
}


class _Only:
    """A middleware for the requests whose path begins with `path`."""

    def __init__(self, app: ASGIApp, path: str, middleware: Middleware) -> None:
        self._past, self._path = app, path
        self._through = middleware.cls(app, *middleware.args, **middleware.kwargs)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        here = scope["type"] != "http" or scope["path"].startswith(self._path)
        await (self._through if here else self._past)(scope, receive, send)


def narrowed(middleware: Middleware) -> Middleware:
    """The same middleware, but for the paths of its own API; if it serves all, as it is."""
    name = getattr(middleware.cls, "__name__", "")
    path = next((path for start, path in _PATHS.items() if name.startswith(start)), None)
    return middleware if path is None else Middleware(_Only, path=path, middleware=middleware)


def pass_by_other_apis() -> None:
    """Have the SuperLink's app, when it is made, ask each middleware only for its own API."""
    all_of_them = superlink._get_middleware

    def get_middleware() -> list[Middleware]:
        return [narrowed(middleware) for middleware in all_of_them()]

    superlink._get_middleware = get_middleware
