"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

_Floats = Literal["float32", "bfloat16", "float16"]
_RECIPE = "A file, a recipe's name, or the run.json of a run folder."
_SETTINGS = "Settings to change, such as train.lr=1e-4."
MODEL = "pocket, a hub id, or the folder of a pipeline."
_LORA = "A LoRA of any trainer: a file, a folder, a run, or a checkpoint of one."
_FLOATS = "float32, bfloat16 or float16."
_VAE = "The autoencoder's precision; Wan's is meant for float32. Default: as --precision."
_DEVICE = "Default: cuda if there is a GPU, else cpu."
_REWARDS = "A name of `dgpo list rewards`; may be repeated."
_HOST = "The address to listen at; 0.0.0.0, which all can reach, needs a token."
_TOKEN = "A file that holds the token which others must know."
RecipeName = Annotated[str, Argument(metavar="RECIPE", help=_RECIPE)]
Overrides = Annotated[list[str] | None, Argument(metavar="KEY=VALUE", help=_SETTINGS)]
Model = Annotated[str, Option("--model", metavar="M", help=MODEL)]
Lora = Annotated[Path | None, Option("--lora", metavar="PATH", help=_LORA)]
Precision = Annotated[_Floats, Option(metavar="P", help=_FLOATS)]
VaePrecision = Annotated[_Floats | None, Option(metavar="P", help=_VAE)]
Device = Annotated[str | None, Option(metavar="D", help=_DEVICE)]
Rewards = Annotated[list[str], Option("--reward", metavar="R", help=_REWARDS)]
Batch = Annotated[int, Option(min=1, metavar="N", help="Pictures made at once.")]
Host = Annotated[str, Option("--host", metavar="H", help=_HOST)]
Port = Annotated[int, Option("--port", min=0, max=65535, metavar="N", help="The port.")]
TokenFile = Annotated[Path | None, Option("--token-file", metavar="F", help=_TOKEN)]
