"""Ways through the SuperLink's HTTP server: closed ones, and shorter ones.

Flower takes a run, which is Python code for the server to run, from whoever reaches the port, also
where nodes need a registered key. Here, everything but the Fleet API is for this host alone.

The time that a request needs in the server is most of a small round.

Every request passes the eight middlewares of Flower's three APIs one after the other. Six of them
do nothing for the paths of another API; those are passed by. And each is a Starlette
BaseHTTPMiddleware, which runs what lies behind it as a task of its own and takes the answer from a
stream, piece by piece, for the sake of answers without end. The answers of the Fleet and the
Runtime API are whole: there, a middleware just awaits what lies behind it.

Of the endpoints, those of the Control API are asked last, and what an endpoint depends on, such as
the SuperLink's state, is looked up where it is needed and not by a thread of a pool for each.
"""

from collections.abc import Callable
from typing import Any

import fastapi.dependencies.utils as dependencies
import flwr.superlink.main as superlink
from fastapi import FastAPI
from flwr.superlink.routers.control import router as control
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, _CachedRequest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# The paths that a middleware does anything for, by the beginning of its name.
_PATHS = {
    "Control": ("/v1/control/",),
    "NodeAuth": ("/v1/fleet/",),
    "FleetEventLog": ("/v1/fleet/",),
}
_EVERY_PATH = ("/",)
_WHOLE_ANSWERS = ("/v1/fleet/", "/v1/runtime/")
_FOR_OTHER_HOSTS = ("/v1/fleet/", "/health")


class _Closed:
    """Refuses other hosts what is not for them. Who comes from this host comes from the very
    address that it went to, on loopback or not."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        here = scope["type"] == "lifespan" or scope["client"][0] == scope["server"][0]
        if here or scope["path"].startswith(_FOR_OTHER_HOSTS):
            await self._app(scope, receive, send)
        else:
            refusal = PlainTextResponse("This API is for the SuperLink's own host.", 403)
            await refusal(scope, receive, send)


class _Short:
    """A middleware for the requests whose path begins with one of `paths`."""

    def __init__(self, app: ASGIApp, paths: tuple[str, ...], middleware: Middleware) -> None:
        self._past, self._paths = app, paths
        made = middleware.cls(app, *middleware.args, **middleware.kwargs)
        assert isinstance(made, BaseHTTPMiddleware)
        self._through = made

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._through(scope, receive, send)
        elif not scope["path"].startswith(self._paths):
            await self._past(scope, receive, send)
        elif not scope["path"].startswith(_WHOLE_ANSWERS):
            await self._through(scope, receive, send)
        else:
            await self._in_one_task(scope, receive, send)

    async def _in_one_task(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = _CachedRequest(scope, receive)

        async def call_next(_: Request) -> Response:
            answer, body = Response(), bytearray()

            async def collect(message: Message) -> None:
                if message["type"] == "http.response.start":
                    answer.status_code, answer.raw_headers = message["status"], message["headers"]
                else:
                    body.extend(message.get("body", b""))

            await self._past(scope, request.wrapped_receive, collect)
            answer.body = bytes(body)
            return answer

        answer = await self._through.dispatch_func(request, call_next)
        await answer(scope, request.wrapped_receive, send)


def shortened(middleware: Middleware) -> Middleware:
    """The same middleware, for the paths of its own API only; if it serves all, for all."""
    name = getattr(middleware.cls, "__name__", "")
    paths = next((paths for start, paths in _PATHS.items() if name.startswith(start)), _EVERY_PATH)
    return Middleware(_Short, paths=paths, middleware=middleware)


async def _here(look_up: Callable[..., Any], **arguments: Any) -> Any:
    return look_up(**arguments)


def lay_ways() -> None:
    """Have the SuperLink's app, when it is made, go these ways."""
    all_middleware, make_app = superlink._get_middleware, superlink.create_app

    def get_middleware() -> list[Middleware]:
        return [shortened(middleware) for middleware in all_middleware()]

    def create_app(*args: Any, **kwargs: Any) -> FastAPI:
        app = make_app(*args, **kwargs)
        app.add_middleware(_Closed)
        app.routes.sort(key=lambda route: getattr(route, "original_router", None) is control)
        return app

    superlink._get_middleware = get_middleware
    superlink.create_app = create_app
    dependencies.run_in_threadpool = _here  # type: ignore[attr-defined, assignment]
