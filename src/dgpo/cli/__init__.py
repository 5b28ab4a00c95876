"""The command ``dgpo``: one module for each of its commands."""

from dgpo.cli.commands import app, main

__all__ = ["app", "main"]
