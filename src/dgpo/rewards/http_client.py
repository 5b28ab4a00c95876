"""How rewards ask servers over HTTP, and which failures are worth another try."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from PIL import Image

from dgpo.errors import UserError
from dgpo.pictures import rgb
from dgpo.rewards.call_limits import Again
from dgpo.rewards.loading import need
from dgpo.secrets import without

if TYPE_CHECKING:
    import httpx

AWAY = (408, 429, 502, 503, 504)
"""The statuses of a server that is busy, or of a proxy whose server is gone."""


def connect(
    who: str, url: str, token: str = "", timeout: float = 60.0, connections: int = 100
) -> httpx.Client:
    """A client for a server; nothing is sent yet.

    Args:
        who: what errors call the asker.
        url: the server's address.
        token: sent as the bearer token; empty for none.
        timeout: seconds for one answer.
        connections: how many may be open at once.

    Raises:
        UserError: httpx is not installed, or the address is none.
    """
    need(who, "httpx", "pip install httpx")
    import httpx

    try:
        return httpx.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=timeout,
            limits=httpx.Limits(max_connections=connections),
        )
    except httpx.InvalidURL as error:
        raise UserError(f"{who}: {url!r}: {error}") from error


def send(client: httpx.Client, method: str, path: str, **body: Any) -> httpx.Response:
    """Send a request and return the answer, whatever its status, :data:`AWAY` excepted.

    Raises:
        Again: the connection broke, no answer came in time, or the server is busy.
    """
    import httpx

    try:
        response = client.request(method, path, **body)
    except httpx.HTTPError as error:
        gone = isinstance(error, httpx.TransportError)
        raise Again(told_by(client, error), gone) from None
    if response.status_code in AWAY:
        raise Again(f"status {response.status_code}: {text_of(response)[:160]}", gone=True)
    return response


def text_of(response: httpx.Response) -> str:
    """Return the text of an answer, without the token if the server repeats it."""
    return _without_token(response.request, response.text)


def told_by(client: httpx.Client, error: Exception) -> str:
    """Return the type and the message of a broken connection, which may quote what was received,
    without the token. Raise it ``from None``: the error itself is not without."""
    return _without_token(client, f"{type(error).__name__} {error}")


def _without_token(asked: httpx.Client | httpx.Request, text: str) -> str:
    return without(asked.headers.get("Authorization", "").removeprefix("Bearer "), text)


def png(image: Image.Image) -> bytes:
    """A picture as it travels, in RGB and without loss."""
    buffer = io.BytesIO()
    rgb(image).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
