"""A reward that is computed by `dgpo serve`, here or on another machine.

Licence, range and direction: those of the reward that is served. Pictures travel as PNG, scores as
JSON numbers, so that a score is the very number that the server has computed.
"""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image

from dgpo.errors import UserError
from dgpo.rewards.guard import RewardFailure
from dgpo.rewards.loading import need
from dgpo.rewards.terms import PASSWORD


class _Retry(Exception):
    """Something that may be better the next time."""


class HttpReward:
    """Asks a reward server.

    Args:
        url: its address, such as ``http://127.0.0.1:8765``; default: ``DGPO_REWARD_URL``.
        reward: the name there; default: ``DGPO_REWARD_NAME``, or the only one that is served.
        token_file: a file with the token; default: ``DGPO_REWARD_TOKEN_FILE``. The token itself
            may be in ``DGPO_REWARD_TOKEN``; it is no argument, as recipes are written down.
        timeout: seconds for one answer.
        retries: further tries after a broken connection or a busy server.
        pause: seconds before the first further try; each next one waits twice as long.
        batch: pictures of one request.
        connections: requests at once, over as many connections, which are kept open.
    """

    __name__ = "http"

    def __init__(
        self,
        url: str | None = None,
        reward: str | None = None,
        token_file: str | None = None,
        timeout: float = 120.0,
        retries: int = 3,
        pause: float = 0.5,
        batch: int = 16,
        connections: int = 4,
    ) -> None:
        self._url, self._reward, self._token_file = url, reward, token_file
        self._timeout, self._retries, self._pause = timeout, retries, pause
        self._batch, self._connections = batch, connections
        self._pool: Any = None

    def check(self, prompts: Sequence[Any]) -> None:
        """See that the server is there and serves the reward.

        Raises:
            UserError: it is not, or the token is not the right one.
        """
        served = self._json(lambda client: client.get("/v1/rewards")).get("rewards", [])
        wanted = self._name()
        if wanted is None and len(served) != 1:
            raise UserError(
                f"reward 'http': {self._address()} serves {', '.join(served)}; set the option "
                "reward, or DGPO_REWARD_NAME, to one of them"
            )
        if wanted is not None and wanted not in served:
            raise UserError(
                f"reward 'http': {self._address()} serves {', '.join(served)}, not {wanted!r}"
            )

    def __call__(
        self, images: Sequence[Image.Image], prompts: Sequence[str], **columns: Sequence[Any]
    ) -> list[float]:
        """One score for each picture.

        Raises:
            RewardFailure: the server could not be reached, or did not answer, at any try.
            UserError: it has refused the request.
        """
        starts = range(0, len(images), self._batch)
        with ThreadPoolExecutor(self._connections) as pool:
            jobs = [
                pool.submit(self._score, images, prompts, columns, slice(at, at + self._batch))
                for at in starts
            ]
            return [number for job in jobs for number in job.result()]

    def _score(self, images: Any, prompts: Any, columns: Any, part: slice) -> list[float]:
        texts, name = [str(text) for text in prompts[part]], self._name()
        cut = {key: column[part] for key, column in columns.items()}
        rows = [{key: cut[key][row] for key in cut} for row in range(len(texts))]
        question = {"prompts": texts, "metadata": rows, "rewards": None if name is None else [name]}
        try:
            form = {"request": json.dumps(question, allow_nan=False)}
        except (TypeError, ValueError) as error:
            raise UserError(
                f"reward 'http': the prompt rows hold what JSON cannot: {error}; leave it out"
            ) from error
        files = [
            ("images", (f"{row}.png", _png(image), "image/png"))
            for row, image in enumerate(images[part])
        ]
        answer = self._json(lambda client: client.post("/v1/score", data=form, files=files))
        scores = answer.get("scores")
        if not isinstance(scores, dict) or len(scores) != 1:
            raise UserError(
                f"reward 'http': {self._address()} gave scores of several rewards; name one with "
                "the option reward, or DGPO_REWARD_NAME"
            )
        (numbers,) = scores.values()
        if not isinstance(numbers, list) or len(numbers) != len(texts):
            raise RewardFailure(f"reward 'http': not {len(texts)} scores: {numbers!r:.80}")
        return numbers

    def _json(self, ask: Any) -> dict[str, Any]:
        """The answer of a request, tried as often as may help."""
        client, reason = self._client(), ""
        for tried in range(self._retries + 1):
            if tried:
                time.sleep(self._pause * 2 ** (tried - 1))
            try:
                return self._answer(ask, client)
            except _Retry as error:
                reason = str(error)
        raise RewardFailure(
            f"reward 'http': no answer from {self._address()} after {self._retries + 1} tries; "
            f"the last: {reason}",
            gone=True,
        )

    def _answer(self, ask: Any, client: Any) -> dict[str, Any]:
        import httpx

        try:
            response = ask(client)
        except httpx.TransportError as error:
            raise _Retry(f"{type(error).__name__} {error}") from error
        if response.status_code in (408, 429, 502, 503, 504):
            raise _Retry(f"status {response.status_code}: {response.text[:160]}")
        try:
            body = response.json()
        except ValueError:
            body = None
        if response.status_code != 200:
            detail = body.get("detail") if isinstance(body, dict) else response.text[:160]
            hint = "; set DGPO_REWARD_TOKEN_FILE" if response.status_code == 401 else ""
            raise UserError(
                f"reward 'http': {self._address()} refused with status {response.status_code}: "
                f"{detail}{hint}"
            )
        if not isinstance(body, dict):
            raise UserError(f"reward 'http': {self._address()} is no reward server")
        return body

    def _client(self) -> Any:
        if self._pool is None:
            need("http", "httpx", "pip install httpx")
            import httpx

            token = self._token()
            try:
                self._pool = httpx.Client(
                    base_url=self._address(),
                    headers={"Authorization": f"Bearer {token}"} if token else {},
                    timeout=self._timeout,
                    limits=httpx.Limits(max_connections=self._connections),
                )
            except httpx.InvalidURL as error:
                raise UserError(f"reward 'http': {self._address()!r}: {error}") from error
        return self._pool

    def _address(self) -> str:
        url = self._url or os.environ.get("DGPO_REWARD_URL", "")
        if not url.startswith(("http://", "https://")):
            raise UserError(
                f"reward 'http' asks a server ({url or 'none'} is given): set DGPO_REWARD_URL, or "
                "the option url, to its address such as http://127.0.0.1:8765"
            )
        if PASSWORD.match(url):
            raise UserError(
                f"reward 'http': the address {url.split('@')[-1]!r} comes with a password, and "
                "recipes are written down: leave it out, and use token_file"
            )
        return url.rstrip("/")

    def _name(self) -> str | None:
        return self._reward or os.environ.get("DGPO_REWARD_NAME") or None

    def _token(self) -> str:
        file = self._token_file or os.environ.get("DGPO_REWARD_TOKEN_FILE")
        if not file:
            return os.environ.get("DGPO_REWARD_TOKEN", "")
        try:
            return Path(file).expanduser().read_text(encoding="utf-8").strip()
        except OSError as error:
            raise UserError(f"reward 'http': token file {file}: {error}") from error


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
