"""The command `dgpo detect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from dgpo.cli.common import new_table
from dgpo.errors import UserError

_LEAST = "The least confidence to list."


def detect(
    image: Annotated[Path, Argument(metavar="PICTURE", help="A picture file.")],
    least: Annotated[float, Option(min=0, max=1, metavar="P", help=_LEAST)] = 0.3,
) -> None:
    """Check GenEval's detector: list the objects in a picture and what CLIP calls their colours.

    Detector and CLIP are those of the reward geneval (DGPO_GENEVAL_DETECTOR, DGPO_CLIP).
    """
    if not image.is_file():
        raise UserError(f"PICTURE {image}: there is no such file")
    from dgpo.pictures import open_picture

    picture = open_picture(image, f"PICTURE {image}")
    from dgpo.rewards.shipped.geneval import published

    eyes = published()
    seen = eyes.look(picture, least)
    console, table = new_table()
    for title in ("object", "confidence", "colour", "left, top, right, bottom"):
        table.add_column(title)
    for one, color in seen:
        box = ", ".join(f"{edge:.0f}" for edge in one.box)
        table.add_row(one.label, f"{one.score:.3f}", color, box)
    console.print(table)
    size = f"{picture.width} x {picture.height}"
    print(f"{len(seen)} objects in {size} pixels; {eyes.detector.weights}")
