"""The command `dgpo check`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, BadParameter, Option

from dgpo.cli.options import MODEL, Device, Precision, VaePrecision
from dgpo.errors import UserError
from dgpo.recipe.files import apply_overrides

_COMPILE = ("off", "blocks", "full")
CALL = "Arguments of the pipeline's call, such as height=512."
IMAGE = "If it starts from a picture."


def _how(value: str) -> str:
    if value not in _COMPILE:
        raise BadParameter(f"{value!r} is not one of {', '.join(_COMPILE)}")
    return value


def check(
    model: Annotated[str, Argument(metavar="MODEL", help=MODEL)],
    call: Annotated[list[str] | None, Argument(metavar="KEY=VALUE", help=CALL)] = None,
    image: Annotated[Path | None, Option(metavar="FILE", help=IMAGE)] = None,
    mask: Annotated[Path | None, Option(metavar="FILE", help="If it paints inside a mask.")] = None,
    precision: Precision = "float32",
    vae_precision: VaePrecision = None,
    device: Device = None,
    compiled: Annotated[
        str, Option("--compile", metavar="HOW", callback=_how, help="off, blocks or full.")
    ] = "off",
) -> None:
    """Prove that a model can be trained, by training it for a moment.

    Its rollouts are repeated point by point, bit for bit. A LoRA is trained, saved and read back.
    """
    from dgpo.prompts import load_prompts
    from dgpo.prompts.caption import pictures_of

    arguments = apply_overrides({}, call or [])
    given = {"image": image, "mask": mask}
    files = {name: str(file) for name, file in given.items() if file is not None}
    pictures = pictures_of(load_prompts([{"prompt": "a picture", **files}])[0].text)
    from dgpo.check.compatibility import examine
    from dgpo.models.load import load_for_sampling
    from dgpo.models.pipeline.adapter import PipelineModel

    found = examine(
        lambda: load_for_sampling(model, precision, device=device, vae_precision=vae_precision),
        lambda pipe: PipelineModel(pipe, call=arguments),
        pictures.get("image"),
        pictures.get("mask"),
        compiled,  # pyright: ignore[reportArgumentType]
    )
    if not found.ok:
        raise UserError(str(found))
    print(found)
