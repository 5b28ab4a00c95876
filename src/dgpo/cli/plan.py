"""The command `dgpo plan`."""

from __future__ import annotations

from typing import Annotated, Literal

from typer import Option

from dgpo.cli.checks import load_recipe
from dgpo.cli.options import Overrides, RecipeName
from dgpo.errors import UserError

_MEMORY = "Refuse a run that needs more."
_GPU_MEMORY = "The same, of each GPU."
_DEVICE = "Where the run is to be; default: as here."
_GPUS = "Plan for so many GPUs, one process each."


def plan(
    recipe: RecipeName,
    overrides: Overrides = None,
    memory: Annotated[float | None, Option(min=0, metavar="GB", help=_MEMORY)] = None,
    gpu_memory: Annotated[float | None, Option(min=0, metavar="GB", help=_GPU_MEMORY)] = None,
    device: Annotated[Literal["cuda", "cpu"] | None, Option(help=_DEVICE)] = None,
    gpus: Annotated[int | None, Option(min=1, help=_GPUS)] = None,
) -> None:
    """Say what a run will cost: parameters, passes, memory, time. No weights are loaded."""
    settings = load_recipe(recipe, overrides)
    if device == "cpu" and (gpus or gpu_memory is not None):
        raise UserError("--device cpu: it has no GPUs; leave --gpus and --gpu-memory out")
    from dgpo.models.load import quiet
    from dgpo.planning import Machine, make_plan

    quiet()
    on_gpus = device == "cuda" or gpus or gpu_memory is not None
    machine = Machine("cuda", gpus or 1) if on_gpus else None
    made = make_plan(settings, Machine("cpu") if device == "cpu" else machine)
    print(made)
    limit = memory if gpu_memory is None else gpu_memory
    if limit is not None:
        made.refuse_beyond(int(limit * 1e9))
