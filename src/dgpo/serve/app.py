"""The reward server: pictures in, numbers out. Nothing on the wire is ever unpickled."""

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, FastAPI, File, Form, HTTPException, Request, UploadFile
from fastapi.concurrency import run_in_threadpool
from fastapi.routing import APIRoute
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError
from starlette.exceptions import HTTPException as StarletteError

from dgpo.prompts import Prompt
from dgpo.rewards import RewardSet
from dgpo.rewards.mixing import COLUMN
from dgpo.serve.batching import Batcher, Busy, Failed, Refused
from dgpo.serve.guard import Guard, why
from dgpo.serve.pictures import BadPicture, open_picture, size_of

T = TypeVar("T")
VERSION = version("dgpo")
_FRAMES = "; a request about videos has 'frames', the number of pictures of each, others have not"


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


class Question(BaseModel):
    """The form field ``request``, JSON."""

    model_config = ConfigDict(extra="forbid")

    prompts: list[str] = Field(min_length=1)
    """The prompt of each picture or video, in order."""
    metadata: list[dict[str, Any]] | None = None
    """What else the prompt rows say, an object for each picture or video."""
    rewards: list[str] | None = None
    """The names of the rewards to ask; null for all that are served."""
    frames: list[PositiveInt] | None = None
    """How many of the pictures, one after the other, each video has; null where there are none."""


class Scores(BaseModel):
    """A number for each picture or video, in order, by the name of the reward."""

    scores: dict[str, list[float]]


class Health(BaseModel):
    status: str
    version: str


class Served(BaseModel):
    rewards: list[str]
    max_images: int
    max_pixels: int
    max_bytes: int


class Problem(BaseModel):
    detail: Any


REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": text}
    for status, text in {
        400: "a picture or the request cannot be read",
        401: "no valid token",
        403: "another machine's name or another page's origin, and no token is set",
        404: "no such reward",
        408: "the body came too slowly",
        413: "too many bytes, pictures or pixels",
        415: "the body is not multipart/form-data",
        422: "the rows cannot be scored",
        503: "busy, or the reward has failed: try again",
        504: "no score in time",
    }.items()
}


def make_app(
    rewards: list[RewardSet],
    token: str | None = None,
    limits: Limits | None = None,
    **batching: Any,
) -> Any:
    """Make an ASGI application that serves rewards.

    Args:
        rewards: sets of one reward each.
        token: the bearer token that every request but ``/health`` needs; None for no token.
        limits: the bounds of a request.
        batching: ``batch``, ``linger`` and ``waiting`` of :class:`Batcher`.
    """
    bounds = limits or Limits()
    scorer = _Scorer(rewards, bounds, batching)
    app = FastAPI(
        title="dgpo rewards",
        version=VERSION,
        description="Scores of pictures. Send `Authorization: Bearer TOKEN` if a token is set.",
    )

    class Bounded(APIRoute):
        """A route whose forms are bounded by what is announced, not by starlette's defaults."""

        def get_route_handler(self) -> Any:
            handle = super().get_route_handler()

            async def bounded(request: Request) -> Any:
                try:
                    await request.form(max_files=bounds.images, max_part_size=bounds.body)
                except StarletteError as error:  # starlette says 400 to all that it cannot read
                    status = 413 if "aximum" in str(error.detail) else error.status_code
                    raise HTTPException(status, error.detail) from None
                return await handle(request)

            return bounded

    @app.get("/health")
    async def health() -> Health:
        """Return whether the server runs; needs no token."""
        return Health(status="ok", version=VERSION)

    @app.get("/v1/rewards", responses={401: REFUSALS[401]})
    async def served() -> Served:
        """What is served, and how much may be asked at once."""
        return Served(
            rewards=scorer.names,
            max_images=bounds.images,
            max_pixels=bounds.pixels,
            max_bytes=bounds.body,
        )

    forms = APIRouter(route_class=Bounded)

    @forms.post("/v1/score", responses=REFUSALS)
    async def score(
        request: Annotated[str, Form(description="JSON: " + ", ".join(Question.model_fields))],
        images: Annotated[
            list[UploadFile], File(description="PNG or WebP, one a prompt, or one a frame")
        ],
    ) -> Scores:
        """Score pictures or videos, in order, with each of the rewards asked for."""
        return await scorer.score(_question(request), images)

    app.include_router(forms)
    return Guard(app, token, bounds.body, "multipart/form-data")


class _Scorer:
    """Answers questions, or refuses them with a status."""

    def __init__(self, rewards: list[RewardSet], limits: Limits, batching: dict[str, Any]) -> None:
        self._batchers = {own.names[0]: Batcher(own, **batching) for own in rewards}
        self._media = {own.names[0]: own.media for own in rewards}
        self._limits = limits

    @property
    def names(self) -> list[str]:
        """The names of the rewards."""
        return list(self._batchers)

    async def score(self, question: Question, images: list[UploadFile]) -> Scores:
        """The scores of pictures or videos by each of the rewards asked for."""
        names = list(dict.fromkeys(question.rewards or self.names))
        for name in names:
            self._check(name, question.frames is not None)
        rows = _rows(question, len(images))
        data = [await image.read() for image in images]
        pictures: list[Any] = await run_in_threadpool(_opened, data, self._limits.pixels)
        if question.frames is not None:
            rest = iter(pictures)
            pictures = [list(islice(rest, count)) for count in question.frames]
        try:
            asked = [self._batchers[name].submit(pictures, rows) for name in names]
        except Busy:
            raise HTTPException(503, "busy", {"Retry-After": "1"}) from None
        answers = asyncio.gather(*map(asyncio.wrap_future, asked))
        try:
            found = await asyncio.wait_for(answers, self._limits.seconds)
        except asyncio.TimeoutError:
            raise HTTPException(504, f"no score within {self._limits.seconds:g} s") from None
        except Refused as error:
            raise HTTPException(422, str(error)) from None
        except Failed as error:
            raise HTTPException(503, str(error)) from None
        return Scores(scores=dict(zip(names, found, strict=True)))

    def _check(self, name: str, videos: bool) -> None:
        if name not in self._batchers:
            served = ", ".join(self._batchers)
            raise HTTPException(404, f"no reward {name!r:.80}; served: {served}")
        if (self._media[name] == "videos") != videos:
            raise HTTPException(422, f"reward {name!r} scores {self._media[name]}{_FRAMES}")


def _question(text: str) -> Question:
    try:
        return Question.model_validate_json(text)
    except ValidationError as error:
        raise HTTPException(400, why(error)) from None


def _rows(question: Question, count: int) -> list[Prompt]:
    metadata = question.metadata
    if metadata is None:
        metadata = [{} for _ in question.prompts]
    frames = [1] * count if question.frames is None else question.frames
    if sum(frames) != count or not len(frames) == len(question.prompts) == len(metadata):
        videos = "" if question.frames is None else f" for {len(frames)} videos of {sum(frames)}"
        raise HTTPException(
            400,
            f"{count} pictures{videos}, {len(question.prompts)} prompts and {len(metadata)} "
            "objects of metadata: one of each belongs together",
        )
    return [
        Prompt(text, {key: value for key, value in own.items() if key != COLUMN})
        for text, own in zip(question.prompts, metadata, strict=True)
    ]


def _opened(data: list[bytes], pixels: int) -> list[Image.Image]:
    total = 0
    for place, one in enumerate(data):  # all headers before the first picture is unpacked
        total += math.prod(_read(place, size_of, one)[1:])
    if total > pixels:
        raise HTTPException(413, f"{total} pixels; at most {pixels} at once")
    return [_read(place, open_picture, one) for place, one in enumerate(data)]


def _read(place: int, how: Callable[[bytes], T], data: bytes) -> T:
    try:
        return how(data)
    except BadPicture as error:
        raise HTTPException(400, f"picture {place}: {error}") from None
