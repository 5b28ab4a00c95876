"""A person over HTTP: likes the brighter half of every group, and may leave."""

from __future__ import annotations

import _thread
import io
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import monotonic
from typing import Any

import httpx
import numpy as np
from PIL import Image

PATIENCE = 120.0
"""Seconds for the first groups to come."""


@contextmanager
def hears_ctrl_c() -> Iterator[None]:
    """Let ``_thread.interrupt_main`` raise in a shell's background job too, where it would not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def after(count: int) -> Callable[[int], bool]:
    """Press Ctrl-C, and leave, after so many answers."""
    return lambda answers: answers == count and _thread.interrupt_main() is None


def bright_half(images: Sequence[Image.Image]) -> list[int]:
    """The places of the brighter half."""
    means = [float(np.asarray(image.convert("RGB"), float).mean()) for image in images]
    return sorted(np.argsort(means, kind="stable")[len(means) // 2 :].tolist())


class Rater:
    """Ranks in a thread of its own while the block runs.

    Args:
        port: of the page.
        leave: called before each answer with the number of answers given; true: answer no more.
        first: groups that must wait before the first answer is given; the test is ended if they
            do not come.
    """

    def __init__(
        self, port: int, leave: Callable[[int], Any] = lambda answers: False, first: int = 1
    ) -> None:
        self._url, self._leave, self._first = f"http://127.0.0.1:{port}", leave, first
        self.answers: list[str] = []
        """Groups, in the order in which they were answered."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Rater:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join(10)

    def _run(self) -> None:
        patience = monotonic() + PATIENCE
        with httpx.Client(base_url=self._url) as client:
            while not self._ended.wait(0.02):
                try:
                    work = client.get("/v1/groups", params={"rater": "script"}).json()
                    if not self.answers and work["status"]["waiting"] < self._first:
                        if monotonic() > patience:
                            return _thread.interrupt_main()
                        continue
                    if not work["groups"]:
                        continue
                    if self._leave(len(self.answers)):
                        return
                    self._rank(client, work["groups"][0])
                except httpx.TransportError:
                    continue

    def _rank(self, client: httpx.Client, group: dict[str, Any]) -> None:
        images = [
            Image.open(io.BytesIO(client.get(f"/v1/groups/{group['id']}/{place}.png").content))
            for place in range(len(group["places"]))
        ]
        answer = {"kind": "likes", "liked": bright_half(images)}
        said = {"rater": "script", "answer": answer}
        client.post(f"/v1/groups/{group['id']}", json=said).raise_for_status()
        self.answers.append(group["id"])
