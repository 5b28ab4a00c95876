"""The command `dgpo collect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

from dgpo.cli.checks import check_folder, check_lora, load_recipe
from dgpo.cli.options import Device, Lora, Overrides, RecipeName
from dgpo.preferences import refuse_existing_groups


def collect(
    recipe: RecipeName,
    out: Annotated[Path, Option(metavar="DIR", help="The folder of the groups.")],
    groups: Annotated[int, Option(min=1, metavar="N", help="Groups to sample.")],
    overrides: Overrides = None,
    lora: Lora = None,
    device: Device = None,
) -> None:
    """Sample groups as a recipe's rollouts do, score them by its rewards, and write them.

    Train on them with: dgpo train RECIPE data.preferences=DIR
    """
    settings = load_recipe(recipe, overrides)
    check_folder("--out", out)
    refuse_existing_groups(out)
    check_lora(lora)
    from dgpo.models.load import load_for_sampling
    from dgpo.training.recording import record

    own = settings.memory.vae_precision
    pipe = load_for_sampling(
        settings.model, settings.precision, lora=lora, device=device, vae_precision=own
    )
    written = record(settings, pipe, out, groups, print)
    print(f"{written} groups in {out}; dgpo train {recipe} data.preferences={out}")
