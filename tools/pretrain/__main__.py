"""Run ``python -m tools.pretrain`` in the root of a clone."""

import typer

from tools.pretrain.cli import pretrain

if __name__ == "__main__":
    command = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    command.command()(pretrain)
    command()
