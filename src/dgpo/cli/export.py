"""The command `dgpo export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from dgpo.exporting import FORMATS, WEIGHTS
from dgpo.exporting import export as run_export

_FORM = f"{', '.join(FORMATS)}."
_MERGE = "Write a whole pipeline with the trained weights in it."
_OUTPUT = "A folder, or a .safetensors file."


def export(
    run: Annotated[Path, Argument(metavar="RUN", help="A run folder, or one of its checkpoints.")],
    form: Annotated[str | None, Option("--format", metavar="F", help=_FORM)] = None,
    merge: Annotated[bool, Option("--merge", help=_MERGE)] = False,
    output: Annotated[Path | None, Option(metavar="PATH", help=_OUTPUT)] = None,
    weights: Annotated[str, Option(metavar="W", help=f"{', '.join(WEIGHTS)}.")] = WEIGHTS[0],
    model: Annotated[str | None, Option(metavar="M", help="Merge into this model instead.")] = None,
) -> None:
    """Write a run's LoRA for diffusers, peft, kohya's scripts or ComfyUI, or a merged pipeline."""
    print(run_export(run, form, output=output, weights=weights, merge=merge, model=model))
