"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

PRECISIONS = ("float32", "bfloat16", "float16")


def _precision(value: str | None) -> str | None:
    if value is not None and value not in PRECISIONS:
        raise typer.BadParameter(f"{value!r} is not one of {', '.join(PRECISIONS)}")
    return value


RecipeName = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE", help="A file, a recipe's name, or the run.json of a run folder."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings to change, such as train.lr=1e-4."),
]
Model = Annotated[
    str,
    typer.Option("--model", metavar="M", help="pocket, a hub id, or the folder of a pipeline."),
]
Lora = Annotated[
    Path | None,
    typer.Option("--lora", metavar="DIR", help="A trained LoRA: a run folder, or its lora/."),
]
Precision = Annotated[
    str,
    typer.Option(metavar="P", callback=_precision, help="float32, bfloat16 or float16."),
]
VaePrecision = Annotated[
    str | None,
    typer.Option(
        metavar="P",
        callback=_precision,
        help="The precision of the autoencoder, as memory.vae_precision; a Wan VAE is meant for "
        "float32. Default: as --precision.",
    ),
]
Device = Annotated[
    str | None, typer.Option(metavar="D", help="Default: cuda if there is a GPU, else cpu.")
]
Rewards = Annotated[
    list[str],
    typer.Option("--reward", metavar="R", help="A name of `dgpo list rewards`; may be repeated."),
]
Batch = Annotated[int, typer.Option(min=1, metavar="N", help="Pictures made at once.")]
Host = Annotated[
    str,
    typer.Option(
        "--host", metavar="H", help="The address to listen at; 0.0.0.0 (all) needs a token."
    ),
]
Port = Annotated[int, typer.Option("--port", min=0, max=65535, metavar="N", help="The port.")]
TokenFile = Annotated[
    Path | None,
    typer.Option(
        "--token-file", metavar="F", help="A file that holds the token which others must know."
    ),
]
