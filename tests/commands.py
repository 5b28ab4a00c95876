"""The command ``dgpo`` as a test calls it."""

from __future__ import annotations

from click.testing import Result
from typer.testing import CliRunner

from dgpo.cli import app


def run(*arguments: str, code: int = 0) -> Result:
    """Run ``dgpo ARGUMENTS`` in this process; its exit code must be ``code``."""
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, (result.output, result.exception)
    return result
