"""Two rollout servers in processes of their own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from families import tiny

TOKEN = "engine-token"


@pytest.fixture(autouse=True)
def _token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DGPO_ROLLOUT_TOKEN", TOKEN)


@pytest.fixture(scope="session")
def urls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    folder = tmp_path_factory.mktemp("engines")
    (folder / "token").write_text(TOKEN)
    place = f"{Path(tiny.__file__)}:sd3_small"
    words = ["-m", "dgpo.rollouts.server", place, "--token-file", str(folder / "token")]
    found, started = [], []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        process = subprocess.Popen(
            [sys.executable, *words, "--port", str(port)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        started.append(process)
        found.append(f"http://127.0.0.1:{port}")
    for url, process in zip(found, started, strict=True):
        while process.poll() is None:
            try:
                httpx.get(f"{url}/health", timeout=5)
                break
            except httpx.TransportError:
                time.sleep(0.1)
        assert process.poll() is None, "the server has ended"
    yield found
    for process in started:
        process.send_signal(signal.SIGKILL)
        process.wait()
