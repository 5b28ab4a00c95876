"""The command `dgpo train`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option

from dgpo.cli.checks import check_folder, load_recipe
from dgpo.cli.common import INTERRUPTED, is_main_process
from dgpo.cli.options import Overrides, RecipeName
from dgpo.disk import resume_command
from dgpo.recipe.files import is_manifest, override, resumed

if TYPE_CHECKING:
    from dgpo.recipe import Recipe

_RESUME = "Go on with the run in run.dir, or in the folder given."


def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    resume: Annotated[bool, Option("--resume", help=_RESUME)] = False,
) -> None:
    """Train by a recipe, and write everything to its run folder.

    RUN/run.json repeats a run: its recipe and seed train again in a new folder beside RUN. Versions
    that differ now are named in a warning. On the same machine the numbers are the same.
    """
    if resume:
        recipe, overrides = resumed(recipe, overrides or [])
    elif is_manifest(recipe):
        overrides = _repeated(Path(recipe), overrides or [])
    settings = load_recipe(recipe, overrides)
    main_process = is_main_process()
    folder = Path(settings.run.dir)
    if main_process and not resume:
        check_new_run(settings)
    from dgpo.models.load import quiet
    from dgpo.trainer import Trainer

    quiet()
    try:
        Trainer(recipe=settings, resume=resume).train()
    except KeyboardInterrupt:
        if not main_process:
            raise typer.Exit(INTERRUPTED) from None
        if (folder / "recipe.yaml").exists():
            hint = f"go on with: {resume_command(folder)}"
            print(f"\nstopped; what was done is in {folder}; {hint}", file=sys.stderr)
        else:
            print("\nstopped before the run began", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    if main_process:
        print(f"done: {folder}/README.md says what was measured, {folder}/curve.png shows it")


def check_new_run(settings: Recipe) -> None:
    """Refuse a run folder that holds a run already, or that cannot be written.

    Raises:
        UserError: the message says how to go on with the run, and how to choose another folder.
    """
    from dgpo.run.tracking import refuse_existing_run

    refuse_existing_run(settings.run.dir)
    check_folder("run.dir", Path(settings.run.dir))


def _repeated(manifest: Path, overrides: list[str]) -> list[str]:
    """Return the overrides that repeat the run of a manifest; warn of what differs from it."""
    from dgpo.distributed import current_processes
    from dgpo.run.manifest import differences, free_folder, read_starts

    processes = current_processes()
    starts = read_starts(manifest)
    folder = processes.broadcast_object(
        lambda: str(free_folder(manifest)), "the folder of the new run"
    )
    if processes.main:
        for difference in differences(starts):
            print(f"warning: {difference}", file=sys.stderr)
    return [override("run.dir", folder), *overrides]
