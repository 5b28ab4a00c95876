"""Guards every server: who may ask, from which page, what kind of body, how much, and how slowly.

:class:`Guard` stands before an application and :class:`Connection` below it; the reward server, the
rollout server and the ranking page have both.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Container
from time import monotonic
from typing import Any, NoReturn
from urllib.parse import urlsplit

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.responses import JSONResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

from dgpo.serve.access import loopback

HEAD = 10.0
"""The seconds in which the whole head of the next request must come."""
BODY = 30.0
"""The seconds that a body may take, and one more for every ``RATE`` bytes that have come."""
RATE = 2**14
CONNECTIONS = 512
"""How many connections may be open; one more ends the one that has waited for a head longest."""
REQUESTS = 64
"""How many requests are answered at a time, besides those of open paths: more would have too many
pictures unpacked in memory."""


class Refusal(Exception):
    """A request is answered with this status, and its connection ends.

    Args:
        status: the status of HTTP.
        detail: what is wrong and what would work.
        headers: headers of the answer.
    """

    def __init__(self, status: int, detail: str, **headers: str) -> None:
        super().__init__(detail)
        # close: the rest of the body is not read
        self.response = JSONResponse({"detail": detail}, status, {"Connection": "close", **headers})


class Guard:
    """A ``Guard`` is ASGI middleware that refuses requests before the application sees them.

    Where there is no token, only names of this machine are answered to, so that no page elsewhere
    reaches it by a name of its own that points here, and no page of another origin may ask.

    Args:
        app: the application behind it; what it cannot validate is told in one line.
        token: the bearer token that requests need; None for none.
        body: the most bytes of a body.
        kind: the content type that the body of a POST must have.
        open_paths: paths that need no token and are answered however busy the server is.
    """

    def __init__(
        self,
        app: FastAPI,
        token: str | None,
        body: int,
        kind: str,
        open_paths: Container[str] = ("/health",),
    ) -> None:
        app.add_exception_handler(RequestValidationError, _invalid)
        self._app, self._body, self._kind, self._open = app, body, kind, open_paths
        self._token = None if token is None else f"Bearer {token}".encode()
        self._busy = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request, or let the application do so."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(receive, send, self._body)
        counted = scope["path"] not in self._open
        self._busy += counted
        try:
            self._check(scope, counted)
            await self._app(scope, exchange.receive, exchange.send)
        except Refusal as refusal:
            exchange.refusal = refusal
        finally:
            self._busy -= counted
        if exchange.refusal is not None and not exchange.started:
            await exchange.refusal.response(scope, receive, send)

    def _check(self, scope: Any, counted: bool) -> None:
        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        if self._token is None:
            _check_page(headers)
        if counted:
            self._check_asker(scope["method"], headers)
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > self._body:
            raise _too_large(self._body)
        if counted and self._busy > REQUESTS:
            detail = f"busy: {REQUESTS} requests are being answered"
            raise Refusal(503, detail, **{"Retry-After": "1"})

    def _check_asker(self, method: str, headers: dict[str, str]) -> None:
        given = headers.get("authorization", "").encode("latin-1")
        if self._token is not None and not hmac.compare_digest(given, self._token):
            detail = "a valid token is needed: Authorization: Bearer TOKEN"
            raise Refusal(401, detail, **{"WWW-Authenticate": "Bearer"})
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if method == "POST" and kind != self._kind:
            raise Refusal(415, f"the body is {kind or 'of no kind'!r:.80}: send {self._kind}")


class _Exchange:
    """The receiving and sending of one request, up to a refusal.

    A framework answers in its own way to a body that it could not read; that answer is dropped.
    """

    def __init__(self, receive: Any, send: Any, most: int) -> None:
        self._receive, self._send, self._most = receive, send, most
        self._begun, self._read, self._whole = monotonic(), 0, False
        self.started = False
        self.refusal: Refusal | None = None

    async def receive(self) -> Any:
        if self._whole:  # then it waits for the end of the connection, however long that takes
            return await self._receive()
        left = BODY + self._read / RATE - (monotonic() - self._begun)
        try:
            message = await asyncio.wait_for(self._receive(), max(left, 0.0))
        except asyncio.TimeoutError:
            self._refuse(Refusal(408, f"the body is too slow: {self._read} bytes came in time"))
        self._read += len(message.get("body", b""))
        if self._read > self._most:
            self._refuse(_too_large(self._most))
        self._whole = not message.get("more_body", False)
        return message

    async def send(self, message: Any) -> None:
        if self.refusal is None or self.started:
            self.started = True
            await self._send(message)

    def _refuse(self, refusal: Refusal) -> NoReturn:
        self.refusal = refusal
        raise refusal


class Connection(H11Protocol):
    """A ``Connection`` ends where the head of the next request does not come in :data:`HEAD`
    seconds. uvicorn's own limit begins after an answer and ends with the next byte."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Begin to wait, in the place of another connection if there are too many."""
        super().connection_made(transport)
        self._wait(self.cycle)
        if len(self.connections) > CONNECTIONS:
            waiting: list[Any] = [one for one in self.connections if one.waits]  # pyright: ignore
            min(waiting, key=lambda one: one.since).transport.abort()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        answered = self.cycle
        super().on_response_complete()  # it begins the next request if that is there already
        self._wait(answered)

    @property
    def waits(self) -> bool:
        """Return whether no request is being read or answered."""
        return self.cycle is None or self.cycle.response_complete

    def _wait(self, last: Any) -> None:
        self.since = self.loop.time()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(HEAD, self._end_after, last)

    def _end_after(self, last: Any) -> None:
        if self.cycle is last:
            self.transport.close()


def uvicorn_settings() -> dict[str, Any]:
    """Return what every server asks of uvicorn."""
    return {"http": Connection, "ws": "none", "timeout_keep_alive": HEAD, "access_log": False}


def why(error: ValidationError | RequestValidationError) -> str:
    """Return in one line what is wrong with a request, without its odd letters and numbers, which
    an answer may not be able to hold."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"])) or "request"
    return f"{where:.200}: {first['msg']:.500}".encode("utf-8", "backslashreplace").decode()


def _check_page(headers: dict[str, str]) -> None:
    host = headers.get("host", "")
    try:
        name = urlsplit(f"//{host}").hostname
    except ValueError:
        name = None
    if name is None or not loopback(name):
        detail = "ask for 127.0.0.1 or localhost, or start the server with a token file"
        raise Refusal(403, detail)
    origin = headers.get("origin", host)
    if origin.rpartition("://")[2].lower() != host.lower():
        detail = f"a page of {origin!r:.80} may not ask: start the server with a token file"
        raise Refusal(403, detail)


def _too_large(most: int) -> Refusal:
    return Refusal(413, f"the body is over {most} bytes: send less at once")


async def _invalid(request: Any, error: Any) -> JSONResponse:
    return JSONResponse({"detail": why(error)}, 422)
