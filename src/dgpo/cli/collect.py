"""`dgpo collect`: ranked groups of a model's own pictures, for offline training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dgpo.cli.common import Device, Lora


def collect(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A file, or a recipe's name.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the groups go.")],
    groups: Annotated[int, typer.Option(min=1, metavar="N", help="How many are sampled.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings to change, such as group_size=8."),
    ] = None,
    lora: Lora = None,
    device: Device = None,
) -> None:
    """Sample groups as the recipe's rollouts do, score them by its rewards, and write them down.

    Train on them with: dgpo train RECIPE data.preferences=DIR
    """
    from dgpo.recipe import Recipe

    settings = Recipe.load(recipe, overrides or [])
    own = settings.memory.vae_precision
    from dgpo.models.load import load_for_sampling

    pipe = load_for_sampling(
        settings.model, settings.precision, lora=lora, device=device, vae_precision=own
    )
    from dgpo.training.recording import record

    written = record(settings, pipe, out, groups, typer.echo)
    typer.echo(f"{written} groups in {out}; dgpo train {recipe} data.preferences={out}")
