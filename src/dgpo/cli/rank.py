"""The command `dgpo rank`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from dgpo.cli.checks import check_folder, check_lora, load_recipe
from dgpo.cli.options import Host, Lora, Overrides, Port, RecipeName, TokenFile
from dgpo.cli.train import check_new_run
from dgpo.errors import UserError
from dgpo.ranking.answers import KINDS
from dgpo.ranking.server import PORT, PageServer

if TYPE_CHECKING:
    from dgpo.ranking.desk import Desk
    from dgpo.ranking.drawing import Artist
    from dgpo.recipe import Recipe

FAREWELL = 3.0
"""Seconds for which the page is served after the last group, to say that all is done."""
_OUT = "Default: ranking in the run's folder."
_GROUPS = "Groups to rank. Default: until Ctrl-C."


def rank(
    recipe: RecipeName,
    overrides: Overrides = None,
    train: Annotated[bool, Option("--train", help="Train by the recipe meanwhile.")] = False,
    out: Annotated[Path | None, Option(metavar="DIR", help=_OUT)] = None,
    groups: Annotated[int | None, Option(min=1, metavar="N", help=_GROUPS)] = None,
    ask: Annotated[str, Option(metavar="HOW", help="likes, order or stars.")] = "likes",
    raters: Annotated[int, Option(min=1, metavar="N", help="People for each group.")] = 1,
    ahead: Annotated[int, Option(min=1, metavar="N", help="Groups to draw ahead of people.")] = 8,
    lora: Lora = None,
    host: Host = "127.0.0.1",
    port: Port = PORT,
    token_file: TokenFile = None,
) -> None:
    """Show people groups of pictures in the browser, and learn from what they prefer.

    Without --train a dataset is made. Stop with Ctrl-C; the same command goes on.
    """
    if ask not in KINDS:
        raise UserError(f"--ask {ask}: one of {', '.join(KINDS)}")
    token = None if token_file is None else str(token_file)
    if train:
        for name, value in {"--groups": groups, "--lora": lora}.items():
            if value is not None:
                raise UserError(f"{name} {value}: the recipe says it where --train is given")
        options = {"ask": ask, "raters": raters, "host": host, "port": port, "token_file": token}
        options["folder"] = None if out is None else str(out)
        _train(load_recipe(recipe, [*(overrides or []), _reward({"options": options})]))
        return
    # the recipe's own rewards are not asked, so a recipe without any is fine
    settings = load_recipe(recipe, [*(overrides or []), _reward(1.0)])
    folder = out or Path(settings.run.dir) / "ranking"
    check_folder("--out", folder)
    check_lora(lora)
    page = PageServer(host, port, token_file)
    from dgpo.ranking.desk import Desk
    from dgpo.ranking.drawing import Artist
    from dgpo.ranking.store import Store

    artist = Artist(settings, lora)
    desk = Desk(Store(folder), raters)
    desk.reopen()
    page.start(desk, ask)
    print(f"{page.invitation}; kept in {folder}")
    stopped = ""
    try:
        _draw(artist, desk, groups, ahead)
        desk.note = "All groups are ranked. Thank you!"
        time.sleep(FAREWELL)
    except KeyboardInterrupt:
        stopped = "\nstopped\n"
    finally:
        page.stop()
        _export(desk, folder, stopped)


def _reward(settings: Any) -> str:
    """Return the override that makes people the only reward."""
    return f"rewards={json.dumps({'human': settings})}"


def _train(settings: Recipe) -> None:
    check_new_run(settings)
    from dgpo.models.load import quiet
    from dgpo.trainer import Trainer

    quiet()
    Trainer(recipe=settings).train()


def _draw(artist: Artist, desk: Desk, groups: int | None, ahead: int) -> None:
    """Draw groups until there are enough, and wait until all are ranked."""
    place = desk.store.next_place()
    while groups is None or place < groups:
        desk.wait_for_room(ahead)
        prompt, images = artist.draw(place)
        desk.post(prompt.text, images, prompt.metadata, place)
        place += 1
    desk.note = "Nothing is left for you; others are still ranking."
    desk.wait_until_empty()


def _export(desk: Desk, folder: Path, stopped: str) -> None:
    """Write the ranked groups as a dataset, and say how far raters agree."""
    from dgpo.ranking.dataset import export

    done, agreement = export(desk.store), desk.state().agreement
    desk.store.close()
    print(f"{stopped}{done} ranked groups in {folder}/groups.jsonl; the same command goes on")
    if agreement.share is not None:
        print(f"raters agree on {agreement.share:.0%} of {agreement.pairs} pairs")
