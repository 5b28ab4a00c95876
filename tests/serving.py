"""An application behind a real socket, as the commands serve it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from dgpo.serve.guard import uvicorn_settings


@contextmanager
def serving(app: Any, log_level: str = "error") -> Iterator[str]:
    """Serve ``app`` inside the block, at the address that this yields."""
    config = uvicorn.Config(app, port=0, log_level=log_level, **uvicorn_settings())
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()
