"""Checks who asks, and how much, before a request is read."""

from __future__ import annotations

import contextlib
import hmac
from collections.abc import Container
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse

OPEN = ("/health",)


@dataclass(frozen=True)
class Limits:
    """The bounds of one request."""

    body: int = 64 * 2**20
    """Bytes of the whole request."""
    images: int = 64
    """Pictures, frames of videos too."""
    pixels: int = 2**26
    """Pixels of all pictures together."""
    seconds: float = 300.0
    """Seconds until the answer."""


class TooLarge(Exception):
    """The body goes on beyond its bound."""


class Gate:
    """ASGI middleware that compares the bearer token in constant time and bounds the body.

    Args:
        app: the application behind it.
        token: the token that requests need; None for none.
        body: the most bytes of a request.
        open_paths: paths that need no token.
    """

    def __init__(
        self, app: Any, token: str | None, body: int, open_paths: Container[str] = OPEN
    ) -> None:
        self._app, self._body, self._open = app, body, open_paths
        self._token = None if token is None else f"Bearer {token}".encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if self._token is not None and scope["path"] not in self._open:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, self._token):
                await _refuse(401, "a valid token is needed: Authorization: Bearer TOKEN", True)(
                    scope, receive, send
                )
                return
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self._body:
            await self._too_large(scope, receive, send)
            return
        read, over, started = 0, False, False

        async def bounded() -> Any:
            nonlocal read, over
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._body:
                over = True
                raise TooLarge
            return message

        async def answer(message: Any) -> None:
            nonlocal started
            if over and not started:
                return  # the framework's answer to a body that it could not read
            started = True
            await send(message)

        with contextlib.suppress(TooLarge):
            await self._app(scope, bounded, answer)
        if over and not started:
            await self._too_large(scope, receive, send)

    async def _too_large(self, scope: Any, receive: Any, send: Any) -> None:
        await _refuse(413, f"the body is over {self._body} bytes: send fewer pictures at once")(
            scope, receive, send
        )


def _refuse(status: int, detail: str, challenge: bool = False) -> JSONResponse:
    # close: the rest of the body is not read
    headers = {"Connection": "close", **({"WWW-Authenticate": "Bearer"} if challenge else {})}
    return JSONResponse({"detail": detail}, status, headers)
