"""What several commands share: their options, loading of a pipeline, and how results are shown."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dgpo.errors import UserError

if TYPE_CHECKING:
    from dgpo.prompts import Prompt

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells expect it."""

Model = Annotated[
    str, typer.Option("--model", metavar="M", help="pocket, a hub id, or a pipeline's folder.")
]
Lora = Annotated[
    Path | None,
    typer.Option("--lora", metavar="DIR", help="A trained LoRA: a run folder, or its lora/."),
]
Precision = Annotated[str, typer.Option(metavar="P", help="float32, bfloat16 or float16.")]
VaePrecision = Annotated[
    str | None,
    typer.Option(
        metavar="P",
        help="Of the autoencoder, as memory.vae_precision; a Wan VAE is meant for float32. "
        "Default: as --precision.",
    ),
]
Device = Annotated[
    str | None, typer.Option(metavar="D", help="Default: cuda if there is one, else cpu.")
]


def prompt_rows(prompt: list[str], more: list[str], source: str | None) -> list[Prompt]:
    """The rows of --prompt or of --prompts, whichever was given."""
    from dgpo.prompts import load_prompts

    if len(prompt) > 1 and more:
        raise UserError(f"{more[0]!r}: write --prompt before each text, or once before all of them")
    texts = [*prompt, *more]
    if more and not prompt:
        raise UserError(f"{more[0]!r}: write --prompt before the text")
    if bool(texts) == (source is not None):
        raise UserError("give either --prompt TEXT (once or more) or --prompts FILE")
    return load_prompts(source if source is not None else texts)


def check_folder(option: str, folder: Path) -> None:
    """Refuse an option's folder that cannot be made or written in, before the compute that its
    files cost.

    Raises:
        UserError: something on the way to it is a file, or may not be written in.
    """
    place = folder.absolute()
    there = next(path for path in (place, *place.parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"{option}: {str(there)!r} is a file, and a folder is needed there")
    if not os.access(there, os.W_OK):
        raise UserError(f"{option}: the folder {str(there)!r} may not be written in")


def check_file(option: str, file: Path | None) -> None:
    """Refuse a file that cannot be written later, likewise.

    Raises:
        UserError: as :func:`check_folder`, or it is a folder.
    """
    if file is None:
        return
    if file.is_dir():
        raise UserError(f"{option}: {str(file)!r} is a folder; give a file")
    check_folder(option, file.parent)


def table(report: Any) -> str:
    """An evaluation's report as it is printed."""
    low, high = report.ci95
    lines = [
        f"{report.benchmark}: {report.overall:.4f}  "
        f"(95% interval {low:.4f} to {high:.4f}, {report.n} pictures)"
    ]
    width = max(map(len, [*report.categories, *report.rewards]), default=0)
    lines += [f"  {name:<{width}}  {value:.4f}" for name, value in report.categories.items()]
    lines += [f"  {name:<{width}}  {value:.4f}" for name, value in report.rewards.items()]
    return "\n".join(lines)


def is_main_process() -> bool:
    """Whether this process speaks for all that a launcher has started, which are then connected."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return True  # without the seconds that importing torch takes
    from dgpo.distributed import current_processes

    return current_processes().main


def tell_the_others(error: Exception) -> None:
    """Other processes of the run, if there are any, end for this error too."""
    if "dgpo.distributed.processes" in sys.modules:
        from dgpo.distributed.processes import tell

        tell(error)
