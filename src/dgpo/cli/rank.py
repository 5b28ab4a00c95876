"""`dgpo rank`: people rank groups of pictures, for a dataset or for a run that waits for them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dgpo.cli.common import Lora
from dgpo.errors import UserError
from dgpo.ranking.answers import KINDS, Kind
from dgpo.ranking.server import PORT, PageServer

if TYPE_CHECKING:
    from dgpo.ranking.desk import Desk
    from dgpo.recipe import Recipe

FAREWELL = 3.0
"""Seconds for which the page is served after the last group: it says that all is done."""


def rank(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A file, or a recipe's name.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings to change, such as group_size=8."),
    ] = None,
    train: Annotated[
        bool, typer.Option("--train", help="Train on the rankings at once, by the recipe.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Default: ranking in the recipe's run.dir."),
    ] = None,
    groups: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Default: until Ctrl-C.")
    ] = None,
    ask: Annotated[str, typer.Option(metavar="HOW", help="likes, order or stars.")] = "likes",
    raters: Annotated[int, typer.Option(min=1, metavar="N", help="People for each group.")] = 1,
    ahead: Annotated[
        int, typer.Option(min=1, metavar="N", help="Groups that are drawn before they are wanted.")
    ] = 8,
    lora: Lora = None,
    host: Annotated[
        str, typer.Option("--host", metavar="H", help="0.0.0.0 for all networks; wants a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, metavar="N")] = PORT,
    token_file: Annotated[
        Path | None,
        typer.Option("--token-file", metavar="F", help="A file with what raters must know."),
    ] = None,
) -> None:
    """Show people groups of pictures in the browser, and learn from what they prefer.

    Without --train a dataset is made. Stop with Ctrl-C and start again: it goes on.
    """
    if ask not in KINDS:
        raise UserError(f"--ask {ask}: one of {', '.join(KINDS)}")
    from dgpo.recipe import Recipe

    if train:
        _refuse({"--groups": groups, "--lora": lora})
        token = None if token_file is None else str(token_file)
        options = {"ask": ask, "raters": raters, "host": host, "port": port, "token_file": token}
        options["folder"] = None if out is None else str(out)
        reward = f"rewards={json.dumps({'human': {'options': options}})}"
        _train(Recipe.load(recipe, [*(overrides or []), reward]))
        return
    # the recipe's own rewards are not asked; one that names none is fine
    human = f"rewards={json.dumps({'human': 1.0})}"
    settings = Recipe.load(recipe, [*(overrides or []), human])
    folder = out or Path(settings.run.dir) / "ranking"
    page = PageServer(host, port, token_file)
    _collect(settings, page, folder, lora, ask, raters, groups, ahead)


def _refuse(given: dict[str, Any]) -> None:
    for name, value in given.items():
        if value is not None:
            raise UserError(f"{name} {value}: the recipe says it where --train is given")


def _train(settings: Recipe) -> None:
    from dgpo.run.tracking import refuse_existing_run

    refuse_existing_run(settings.run.dir)
    from dgpo.models.load import quiet
    from dgpo.trainer import Trainer

    quiet()
    Trainer(recipe=settings).train()


def _collect(
    settings: Recipe,
    page: PageServer,
    folder: Path,
    lora: Path | None,
    ask: Kind,
    raters: int,
    groups: int | None,
    ahead: int,
) -> None:
    from dgpo.models.load import quiet
    from dgpo.models.weights.lora import lora_folder

    weights = None if lora is None else lora_folder(lora)
    from dgpo.ranking.dataset import export
    from dgpo.ranking.desk import Desk
    from dgpo.ranking.drawing import Artist
    from dgpo.ranking.store import Store

    quiet()
    artist = Artist(settings, weights)
    store = Store(folder)
    desk = Desk(store, raters)
    desk.reopen()
    page.start(desk, ask)
    typer.echo(f"{page.invitation}; kept in {folder}")
    try:
        _draw(artist, desk, groups, ahead)
        desk.note = "All groups are ranked. Thank you!"
        time.sleep(FAREWELL)
    except KeyboardInterrupt:
        typer.echo("\nstopped")
    finally:
        page.stop()
        done, agreement = export(store), desk.state().agreement
        store.close()
        typer.echo(f"{done} ranked groups in {folder}/groups.jsonl; the same command goes on")
        if agreement.share is not None:
            typer.echo(f"raters agree on {agreement.share:.0%} of {agreement.pairs} pairs")


def _draw(artist: Any, desk: Desk, groups: int | None, ahead: int) -> None:
    """Draw groups until there are enough, and wait until all are ranked."""
    place = desk.store.next_place()
    while groups is None or place < groups:
        desk.wait_for_room(ahead)
        prompt, images = artist.draw(place)
        desk.post(prompt.text, images, prompt.metadata, place)
        place += 1
    desk.note = "Nothing is left for you; others are still ranking."
    desk.wait_until_empty()
