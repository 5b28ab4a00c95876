"""The command ``dgpo``. Commands check what is cheap first, and import what is heavy inside."""

from __future__ import annotations

import gc
import io
import os
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from dgpo.cli.bench import bench
from dgpo.cli.check import check
from dgpo.cli.collect import collect
from dgpo.cli.common import INTERRUPTED, tell_the_others
from dgpo.cli.compare import compare
from dgpo.cli.detect import detect
from dgpo.cli.eval import evaluate
from dgpo.cli.export import export
from dgpo.cli.list import names
from dgpo.cli.plan import plan
from dgpo.cli.prompts import prompts
from dgpo.cli.rank import rank
from dgpo.cli.sample import sample
from dgpo.cli.score import score
from dgpo.cli.serve import serve
from dgpo.cli.train import train
from dgpo.errors import UserError


class _Commands(TyperGroup):
    """Prints a user's mistake without a traceback; exit code 2, and 130 after Ctrl-C."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            tell_the_others(error)
            print(error, file=sys.stderr)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            print("\nstopped", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Post-train any diffusion or flow model of diffusers with any reward, by Direct Group "
    "Preference Optimization.\n\nStart with:  dgpo train pocket-geneval train.max_minutes=5",
)
for command in (collect, compare, prompts, plan, sample, rank, score, detect, serve):
    app.command()(command)
app.command("list")(names)
app.command("eval")(evaluate)
for command in (train, export, check, bench):
    app.command()(command)


def main() -> None:
    """Run the console script."""
    # `my_rewards:score` in the current folder is found, as with `python -m`; it comes last in the
    # path, so that it hides nothing that is installed
    sys.path.append(os.getcwd())
    for stream in (sys.stdout, sys.stderr):
        # a stream that cannot hold a prompt's letters gets escapes; by lines, so that whoever reads
        # a pipe is told at once, and a pipe that is closed ends the command here and not at the end
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    # transformers warns of image processors without torchvision as soon as it is imported
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app()
    finally:
        gc.freeze()  # the process ends: a last search for circles would take a second
