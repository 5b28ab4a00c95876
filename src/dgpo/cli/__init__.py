"""The command ``dgpo``: one module for each of its larger commands."""

from dgpo.cli.commands import app, main

__all__ = ["app", "main"]
