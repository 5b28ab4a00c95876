"""The command `dgpo bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from dgpo.cli.check import CALL, IMAGE
from dgpo.cli.options import MODEL, Device, Precision
from dgpo.errors import UserError
from dgpo.recipe.files import apply_overrides

_ROWS = "Rows of a pass, such as 8,16,32."


def bench(
    model: Annotated[str, Argument(metavar="MODEL", help=MODEL)],
    call: Annotated[list[str] | None, Argument(metavar="KEY=VALUE", help=CALL)] = None,
    rows: Annotated[str, Option("--rows", metavar="N,N", help=_ROWS)] = "1,8,16",
    image: Annotated[Path | None, Option(metavar="FILE", help=IMAGE)] = None,
    compiled: Annotated[
        bool, Option("--compile", help="Measure with compiled blocks, too; takes minutes.")
    ] = False,
    precision: Precision = "bfloat16",
    device: Device = None,
) -> None:
    """Measure a model's passes on this machine: milliseconds, share of the peak, memory, waits.

    A LoRA of the default rank is attached, so that the passes are those of a training run.
    """
    sizes = [int(size) if size.strip().isdigit() else 0 for size in rows.split(",")]
    if min(sizes) < 1:
        raise UserError(f"--rows {rows}: give whole numbers from 1 up, such as 8,16,32")
    arguments = apply_overrides({}, call or [])
    from dgpo.prompts import load_prompts

    row = {"prompt": "a picture", **({} if image is None else {"image": str(image)})}
    text = load_prompts([row])[0].text
    from dgpo.models.load import load_for_sampling
    from dgpo.models.pipeline.adapter import PipelineModel
    from dgpo.models.policy import Policy
    from dgpo.planning import advice, measure
    from dgpo.recipe.sections import LoraSettings

    pipe = load_for_sampling(model, precision, device=device)
    own = PipelineModel(pipe, call=arguments)
    passes = measure.Passes(Policy(own, LoraSettings()), own.encode([text], guidance=True))
    print(f"{type(pipe).__name__}, {precision}, {measure.described(own.device)}")
    found = [one for size in sizes for one in passes.measure(size)]
    print(advice.table(found))
    again = []
    if compiled:
        measure.compile_blocks(own.denoisers.values())
        again = [one for size in sizes for one in passes.measure(size)]
        print(f"\nwith compiled blocks\n{advice.table(again)}")
    print(*advice.told_of_waits(found), *advice.advice(found, again, precision), sep="\n")
