"""The page where people rank groups, and the small interface behind it.

The page itself holds nothing of a run: all that it shows comes over the interface, which wants the
token if there is one. Texts reach the page as JSON and are shown as text, never as HTML.
"""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable
from importlib.resources import files
from typing import Annotated, Any, Literal

from fastapi import FastAPI, HTTPException, Path, Query
from fastapi.responses import FileResponse, Response
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from dgpo.ranking.answers import Answer, Kind
from dgpo.ranking.desk import Desk
from dgpo.ranking.store import Group, Store
from dgpo.serve.guard import Guard

BODY = 64 * 1024
"""The most bytes of an answer."""
AHEAD = 2
"""How many groups a page asks for: the one it shows, and one whose pictures it loads meanwhile."""
PAGES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def _name(name: str) -> str:
    name = " ".join(name.split())
    if not name or not name.isprintable():
        raise ValueError("a name has printable letters")
    return name


Rater = Annotated[str, Field(min_length=1, max_length=40), AfterValidator(_name)]
Id = Annotated[str, Path(pattern="^[0-9a-f]{32}$")]


class Shown(BaseModel):
    """A group as a rater sees it: each rater has an order of places of their own, so that being
    the first on the page favours no picture."""

    id: str
    prompt: str
    places: list[int]
    sources: list[str]
    """Which of ``image`` and ``mask`` the prompt speaks of."""
    answer: Answer | None = None


class Status(BaseModel):
    ask: Kind
    ranked: int
    all_ranked: dict[str, int]
    waiting: int
    agreement: float | None
    pairs: int
    note: str


class Work(BaseModel):
    groups: list[Shown]
    status: Status


class Said(BaseModel):
    model_config = ConfigDict(extra="forbid")

    rater: Rater
    answer: Answer
    seconds: float | None = Field(default=None, ge=0, le=86_400, allow_inf_nan=False)


class Kept(BaseModel):
    in_time: bool
    """True if training learns from it; the dataset has it in any case."""


def make_app(desk: Desk, ask: Kind = "likes", token: str | None = None) -> Any:
    """Make an ASGI application with the page.

    Args:
        desk: where groups come from and answers go.
        ask: how people are asked first; they may choose another way.
        token: the bearer token that every request needs except those for the page itself.
    """
    app = FastAPI(title="dgpo rank", docs_url=None, redoc_url=None, openapi_url=None)

    def status(rater: str) -> Status:
        state = desk.state()
        return Status(
            ask=ask,
            ranked=state.ranked.get(rater, 0),
            all_ranked=state.ranked,
            waiting=state.waiting,
            agreement=state.agreement.share,
            pairs=state.agreement.pairs,
            note=state.note,
        )

    @app.get("/v1/groups")
    def groups(rater: Annotated[Rater, Query()]) -> Work:
        """The groups to rank now and next."""
        found = [_shown(group, rater) for group in desk.next(rater, AHEAD)]
        return Work(groups=found, status=status(rater))

    @app.get("/v1/last")
    def last(rater: Annotated[Rater, Query()]) -> Work:
        """The group that the rater has answered last, with the answer."""
        group = desk.store.last_of(rater)
        if group is None:
            raise HTTPException(404, "nothing has been ranked under this name")
        shown = _shown(group, rater)
        shown.answer = desk.store.answers(group)[rater]
        return Work(groups=[shown], status=status(rater))

    @app.post("/v1/groups/{id}")
    def answer(id: Id, said: Said) -> Kept:
        """Keep an answer; it is on the disk when this returns."""
        try:
            in_time = desk.answer(id, said.rater, said.answer, said.seconds)
        except KeyError:
            raise HTTPException(404, "no such group") from None
        except ValueError as error:
            raise HTTPException(422, str(error)) from None
        except sqlite3.Error as error:
            raise HTTPException(507, f"the answer could not be kept: {error}") from None
        return Kept(in_time=in_time)

    _serve_pictures(app, desk.store)
    for path, (name, kind) in PAGES.items():
        content = (files("dgpo.ranking") / "page" / name).read_bytes()
        app.get(path)(_static(content, kind))

    return _Headers(Guard(app, token, BODY, "application/json", PAGES))


def _serve_pictures(app: FastAPI, store: Store) -> None:
    @app.get("/v1/groups/{id}/{place}.png")
    def picture(id: Id, place: Annotated[int, Path(ge=0)]) -> Response:
        """A picture of a group."""
        return sent(id, lambda group: group.files[place])

    @app.get("/v1/groups/{id}/source/{key}.png")
    def source(id: Id, key: Literal["image", "mask"]) -> Response:
        """A picture that the prompt of a group speaks of."""
        return sent(id, lambda group: group.sources[key])

    def sent(id: str, file: Callable[[Group], str]) -> Response:
        try:
            place = store.folder / file(store.group(id))
        except (KeyError, IndexError):
            raise HTTPException(404, "no such picture") from None
        return FileResponse(place, media_type="image/png")


def _static(content: bytes, kind: str) -> Any:
    async def page() -> Response:
        return Response(content, media_type=kind)

    return page


def _shown(group: Group, rater: str) -> Shown:
    places = list(range(group.size))
    random.Random(f"{group.id} {rater}").shuffle(places)
    return Shown(id=group.id, prompt=group.prompt, places=places, sources=list(group.sources))


class _Headers:
    """ASGI middleware that adds the headers of every answer."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._headers = [(k.lower().encode(), v.encode()) for k, v in HEADERS.items()]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def answer(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), *self._headers]}
            await send(message)

        await self._app(scope, receive, answer)
