"""A person over HTTP: likes the brighter half of every group, and may leave."""

from __future__ import annotations

import io
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import numpy as np
from PIL import Image


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def bright_half(images: Sequence[Image.Image]) -> list[int]:
    """The places of the brighter half."""
    means = [float(np.asarray(image.convert("RGB"), float).mean()) for image in images]
    return sorted(np.argsort(means, kind="stable")[len(means) // 2 :].tolist())


class Rater:
    """Ranks in a thread of its own while the block runs.

    Args:
        port: of the page.
        leave: called before each answer with the number of answers given; true: answer no more.
    """

    def __init__(self, port: int, leave: Callable[[int], Any] = lambda answers: False) -> None:
        self._url, self._leave = f"http://127.0.0.1:{port}", leave
        self.answers: list[str] = []
        self.waiting: list[int] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Rater:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join(10)

    def _run(self) -> None:
        with httpx.Client(base_url=self._url) as client:
            while not self._ended.wait(0.02):
                try:
                    work = client.get("/v1/groups", params={"rater": "script"}).json()
                    if not work["groups"]:
                        continue
                    self.waiting.append(work["status"]["waiting"])
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
