"""A reward that `dgpo serve` computes, here or on another machine.

Licence, range and direction: those of the reward that is served. Pictures and the frames of videos
travel as PNG, scores as JSON numbers, so that a score is the very number that the server has
computed.
"""

from __future__ import annotations

import functools
import json
import math
import operator
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from dgpo.errors import UserError
from dgpo.rewards.call_limits import Again, persist
from dgpo.rewards.http_client import connect, png, send, text_of
from dgpo.rewards.reward import Media, Reward, RewardFailure, Texts
from dgpo.rewards.shipped.video import frames_of
from dgpo.secrets import PASSWORD, token_in, token_of

_HEADERS = 512
"""The most bytes that a request has, and each part of it, besides the picture or prompt row."""


@dataclass(frozen=True)
class _Bounds:
    """The most that the server takes at once: pictures (frames of videos too), pixels and bytes."""

    images: float = math.inf
    pixels: float = math.inf
    bytes: float = math.inf

    def cut(self, sizes: Sequence[tuple[int, int, int]], batch: int) -> Iterator[slice]:
        """Cut rows into requests, one after the other.

        Args:
            sizes: pictures, pixels and bytes of each row.
            batch: the most rows of a request.

        Raises:
            UserError: a row is too large for a request of its own.
        """
        most = (batch, self.images, self.pixels, self.bytes)
        first, sums = 0, (0, 0, 0, _HEADERS)
        for row, own in enumerate(sizes):
            alone = (1, *own[:2], _HEADERS + own[2])
            if any(map(operator.gt, alone, most)):
                raise UserError(
                    f"reward 'http', row {row} has {own[0]} pictures of {own[1]} pixels and "
                    f"{own[2]} bytes; the server takes {self.images}, {self.pixels} and "
                    f"{self.bytes} at once: start it with more --max-images, --max-megapixels or "
                    "--max-mb"
                )
            sums = tuple(map(operator.add, sums, (1, *own)))
            if any(map(operator.gt, sums, most)):
                yield slice(first, row)
                first, sums = row, alone
        if sizes:
            yield slice(first, len(sizes))


@dataclass(eq=False)
class HttpReward(Reward):
    """Asks a reward server.

    The token may be in the environment variable ``DGPO_REWARD_TOKEN``; it is no option, as recipes
    are written down.
    """

    name = "http"

    url: str | None = None
    """The server's address, such as ``http://127.0.0.1:8765``; default: ``DGPO_REWARD_URL``."""
    reward: str | None = None
    """The reward's name there; default: ``DGPO_REWARD_NAME``, or the only one that is served."""
    token_file: str | None = None
    """A file with the token; default: ``DGPO_REWARD_TOKEN_FILE``."""
    timeout: float = 120.0
    """Seconds for one answer."""
    retries: int = 3
    """How many more times to ask after a broken connection or a busy server."""
    pause: float = 0.5
    """Seconds before the first further try; each next one waits twice as long."""
    batch: int = 16
    """Pictures or videos of one request; fewer where the server takes fewer."""
    connections: int = 4
    """Requests at once, over as many connections, which are kept open."""

    def __post_init__(self) -> None:
        self._bounds: _Bounds | None = None

    def check(self, prompts: Sequence[Any]) -> None:
        """See that the server is there and serves the reward.

        Raises:
            UserError: it is not, or the token is not the right one.
        """
        served, wanted = self._offer().get("rewards", []), self._served_name()
        said = f"reward 'http': {self._address()} serves {', '.join(served)}"
        if wanted is None and len(served) != 1:
            raise UserError(f"{said}; set the option reward, or DGPO_REWARD_NAME, to one of them")
        if wanted is not None and wanted not in served:
            raise UserError(f"{said}, not {wanted!r}")

    def __call__(self, images: Media, prompts: Texts, **columns: Any) -> list[float]:
        """One score for each picture or video.

        Args:
            images: B pictures, or B videos as
                :class:`dgpo.rewards.shipped.video.PerFrame` takes them.
            prompts: the caption of each.
            columns: metadata, which goes along as JSON.

        Raises:
            RewardFailure: the server could not be reached, or did not answer, at any try.
            UserError: it has refused the request, or a row is neither a picture nor a video, or is
                too large by itself.
        """
        if self._bounds is None:
            self._offer()
        texts = [str(text) for text in prompts]
        rows = [{key: column[row] for key, column in columns.items()} for row in range(len(texts))]
        frames, videos = _frames(images)
        with ThreadPoolExecutor(self.connections) as pool:
            files = [list(pool.map(png, pictures)) for pictures in frames]
            sizes = [
                (
                    len(pictures),
                    sum(picture.width * picture.height for picture in pictures),
                    sum(len(png) + _HEADERS for png in pngs) + len(_json_of([text, own])),
                )
                for pictures, pngs, text, own in zip(frames, files, texts, rows, strict=True)
            ]
            assert self._bounds is not None
            jobs = [
                pool.submit(self._score, files[part], texts[part], rows[part], videos)
                for part in self._bounds.cut(sizes, self.batch)
            ]
            return [number for job in jobs for number in job.result()]

    def _offer(self) -> dict[str, Any]:
        """What the server serves, and how much it takes at once."""
        offer = self._json("GET", "/v1/rewards")
        given = (offer.get(f"max_{what}") for what in ("images", "pixels", "bytes"))
        self._bounds = _Bounds(*(one if isinstance(one, int) else math.inf for one in given))
        return offer

    def _score(
        self, pngs: list[list[bytes]], texts: list[str], rows: list[Any], videos: bool
    ) -> list[float]:
        name = self._served_name()
        question = {"prompts": texts, "metadata": rows, "rewards": None if name is None else [name]}
        if videos:
            question["frames"] = [len(own) for own in pngs]
        form = {"request": _json_of(question)}
        every = enumerate(png for own in pngs for png in own)
        files = [("images", (f"{place}.png", png, "image/png")) for place, png in every]
        scores = self._json("POST", "/v1/score", data=form, files=files).get("scores")
        if not isinstance(scores, dict) or len(scores) != 1:
            raise UserError(
                f"reward 'http': {self._address()} gave scores of several rewards; name one with "
                "the option reward, or DGPO_REWARD_NAME"
            )
        (numbers,) = scores.values()
        if not isinstance(numbers, list) or len(numbers) != len(texts):
            raise RewardFailure(f"reward 'http': not {len(texts)} scores: {numbers!r:.80}")
        return numbers

    def _json(self, method: str, path: str, **body: Any) -> dict[str, Any]:
        """The answer to a request, tried as often as may help."""
        client, address = self._client, self._address()
        try:
            response = persist(lambda: send(client, method, path, **body), self.retries, self.pause)
        except Again as failure:
            raise RewardFailure(
                f"reward 'http': no answer from {address} after {self.retries + 1} tries; "
                f"the last: {failure}",
                gone=True,
            ) from failure
        try:
            answer = json.loads(text_of(response))
        except ValueError:
            answer = None
        if response.status_code != 200:
            detail = answer.get("detail") if isinstance(answer, dict) else text_of(response)[:160]
            hint = "; set DGPO_REWARD_TOKEN_FILE" if response.status_code == 401 else ""
            raise UserError(
                f"reward 'http': {address} refused with status {response.status_code}: "
                f"{detail}{hint}"
            )
        if not isinstance(answer, dict):
            raise UserError(f"reward 'http': {address} is no reward server")
        return answer

    @functools.cached_property
    def _client(self) -> Any:
        address = self._address()
        return connect("reward 'http'", address, self._token(), self.timeout, self.connections)

    def _address(self) -> str:
        url = self.url or os.environ.get("DGPO_REWARD_URL", "")
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

    def _served_name(self) -> str | None:
        return self.reward or os.environ.get("DGPO_REWARD_NAME") or None

    def _token(self) -> str:
        file = self.token_file or os.environ.get("DGPO_REWARD_TOKEN_FILE")
        return token_of(Path(file)) if file else token_in("DGPO_REWARD_TOKEN")


def _json_of(given: Any) -> str:
    try:
        return json.dumps(given, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"reward 'http': the prompt rows hold what JSON cannot: {error}; leave it out"
        ) from error


def _frames(images: Sequence[Any]) -> tuple[list[list[Image.Image]], bool]:
    """The pictures of each row, and whether the rows are videos."""
    found = []
    for row, image in enumerate(images):
        pictures = [image] if isinstance(image, Image.Image) else frames_of(image)
        if pictures is None:
            raise UserError(
                f"reward 'http', row {row} is {type(image).__name__}, neither a picture nor a "
                "video: sounds cannot be sent; ask their reward in this process"
            )
        found.append(pictures)
    videos = {not isinstance(image, Image.Image) for image in images}
    if len(videos) > 1:
        raise UserError("reward 'http': some rows are pictures and some are videos; send one kind")
    return found, True in videos
