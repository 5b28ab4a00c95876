"""Runs the page's server in a thread beside whatever makes the pictures."""

from __future__ import annotations

import importlib.util
import socket
import threading
import time
from pathlib import Path
from typing import Any

from dgpo.errors import UserError
from dgpo.ranking.answers import Kind
from dgpo.ranking.desk import Desk
from dgpo.serve.access import token_for

PORT = 8766


class PageServer:
    """Serves the page. The port is taken at once, requests are answered from :meth:`start` on.

    Args:
        host: the address; 127.0.0.1 is for this machine alone, others want a token.
        port: the port; 0 for any that is free.
        token_file: a file with what raters must know.
        names: what the user calls the settings host, port and token file.

    Raises:
        UserError: a package is missing, the port is taken, or a token is missing.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = PORT,
        token_file: str | Path | None = None,
        names: tuple[str, str, str] = ("--host", "--port", "--token-file"),
    ) -> None:
        for module in ("fastapi", "uvicorn"):
            if importlib.util.find_spec(module) is None:
                raise UserError(f"ranking by people needs {module}: pip install 'dgpo[serve]'")
        file = None if token_file is None else Path(token_file)
        self._token = token_for(host, file, (names[0], names[2]))
        self._socket = _taken(host, port, names)
        self._host = host
        self.port: int = self._socket.getsockname()[1]
        self._server: Any = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """The address of the page."""
        name = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{name}:{self.port}/"

    @property
    def invitation(self) -> str:
        """What to tell people."""
        more = "" if self._token is None else " (it asks for the token once)"
        return f"open {self.url} in a browser and rank{more}"

    def start(self, desk: Desk, ask: Kind) -> None:
        """Answer requests from now on.

        Raises:
            UserError: the server could not start.
        """
        import uvicorn

        from dgpo.ranking.app import make_app
        from dgpo.serve.guard import uvicorn_settings

        app = make_app(desk, ask, self._token)
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="error", **uvicorn_settings()))
        self._thread = threading.Thread(
            target=self._server.run, args=([self._socket],), daemon=True, name="ranking page"
        )
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise UserError("the page's server could not start")
            time.sleep(0.01)

    def stop(self) -> None:
        """Answer what was asked already, and nothing more."""
        if self._thread is not None:
            self._server.should_exit = True
            self._thread.join(timeout=5)
        self._socket.close()


def _taken(host: str, port: int, names: tuple[str, str, str]) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    taken = socket.socket(family, socket.SOCK_STREAM)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind((host, port))
    except OSError as error:
        taken.close()
        raise UserError(
            f"{names[0]} {host}, {names[1]} {port}: {error.strerror or error}; choose another "
            f"port, or 0 for any that is free"
        ) from error
    return taken
