"""The reward server: pictures in, numbers out. Nothing on the wire is ever unpickled."""

import asyncio
import math
from collections.abc import Callable
from importlib.metadata import version
from itertools import islice
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, File, Form, HTTPException, UploadFile
from fastapi.concurrency import run_in_threadpool
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from dgpo.prompts import Prompt
from dgpo.rewards import RewardSet
from dgpo.serve.batching import Batcher, Busy, Failed, Refused
from dgpo.serve.limits import Gate, Limits
from dgpo.serve.pictures import BadPicture, open_picture, size_of

T = TypeVar("T")
VERSION = version("dgpo")
_FRAMES = "; a request about videos has 'frames', the number of pictures of each, others have not"


class Question(BaseModel):
    """The form field ``request``, JSON."""

    model_config = ConfigDict(extra="forbid")

    prompts: list[str] = Field(min_length=1)
    """One a picture or video, in order."""
    metadata: list[dict[str, Any]] | None = None
    """What else the prompt rows say, an object a picture or video."""
    rewards: list[str] | None = None
    """Names of rewards that are served; null: all."""
    frames: list[PositiveInt] | None = None
    """Of videos: how many of the pictures, one after the other, each has; null: no videos."""


class Scores(BaseModel):
    """One number a picture and reward, in order."""

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


def make_app(
    rewards: list[RewardSet],
    token: str | None = None,
    limits: Limits | None = None,
    **batching: Any,
) -> Any:
    """An ASGI application that serves rewards.

    Args:
        rewards: a set of one reward each.
        token: wanted as a bearer token of every request but ``/health``; None: no token.
        limits: of a request.
        batching: ``batch``, ``linger`` and ``waiting`` of :class:`Batcher`.
    """
    bounds = limits or Limits()
    batchers = {own.names[0]: Batcher(own, **batching) for own in rewards}
    media = {own.names[0]: own.media for own in rewards}
    app = FastAPI(
        title="dgpo rewards",
        version=VERSION,
        description="Scores of pictures. Send `Authorization: Bearer TOKEN` if a token is set.",
    )
    refusals: dict[int | str, dict[str, Any]] = {
        status: {"model": Problem, "description": text}
        for status, text in {
            400: "a picture or the request cannot be read",
            401: "no valid token",
            404: "no such reward",
            413: "too many bytes, pictures or pixels",
            422: "the rows cannot be scored",
            503: "busy, or the reward has failed: try again",
            504: "no score in time",
        }.items()
    }

    @app.get("/health")
    async def health() -> Health:
        """Whether the server runs; needs no token."""
        return Health(status="ok", version=VERSION)

    @app.get("/v1/rewards", responses={401: refusals[401]})
    async def served() -> Served:
        """What is served, and how much may be asked at once."""
        return Served(
            rewards=list(batchers),
            max_images=bounds.images,
            max_pixels=bounds.pixels,
            max_bytes=bounds.body,
        )

    @app.post("/v1/score", responses=refusals)
    async def score(
        request: Annotated[str, Form(description="JSON: " + ", ".join(Question.model_fields))],
        images: Annotated[
            list[UploadFile], File(description="PNG or WebP, one a prompt, or one a frame")
        ],
    ) -> Scores:
        """Score pictures or videos, in order, with each of the rewards asked for."""
        question = _question(request)
        names = list(dict.fromkeys(question.rewards or batchers))
        for name in names:
            if name not in batchers:
                raise HTTPException(404, f"no reward {name!r:.80}; served: {', '.join(batchers)}")
            if (media[name] == "videos") != (question.frames is not None):
                raise HTTPException(422, f"reward {name!r} scores {media[name]}{_FRAMES}")
        if len(images) > bounds.images:
            raise HTTPException(413, f"{len(images)} pictures; at most {bounds.images} at once")
        rows = _rows(question, len(images))
        data = [await image.read() for image in images]
        pictures: list[Any] = await run_in_threadpool(_opened, data, bounds.pixels)
        if question.frames is not None:
            rest = iter(pictures)
            pictures = [list(islice(rest, count)) for count in question.frames]
        try:
            asked = {name: batchers[name].submit(pictures, rows) for name in names}
        except Busy:
            raise HTTPException(503, "busy", {"Retry-After": "1"}) from None
        answers = asyncio.gather(*(asyncio.wrap_future(one) for one in asked.values()))
        try:
            found = await asyncio.wait_for(answers, bounds.seconds)
        except asyncio.TimeoutError:
            raise HTTPException(504, f"no score within {bounds.seconds:g} s") from None
        except Refused as error:
            raise HTTPException(422, str(error)) from None
        except Failed as error:
            raise HTTPException(503, str(error)) from None
        return Scores(scores=dict(zip(names, found, strict=True)))

    return Gate(app, token, bounds.body)


def _question(text: str) -> Question:
    try:
        return Question.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise HTTPException(400, f"request: {key + ': ' if key else ''}{first['msg']}") from None


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
        Prompt(text, {key: value for key, value in own.items() if key != "rewards"})
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
