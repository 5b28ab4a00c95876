"""Errors tell a user what is wrong; their message alone is enough to put it right."""

from __future__ import annotations

import sysconfig
import traceback
from pathlib import Path

_OURS = str(Path(__file__).parent)
_LIBRARIES = (
    *map(sysconfig.get_path, ("stdlib", "purelib", "platlib")),
    "<",
)
"""How the names of files begin that no user has written."""


class UserError(ValueError):
    """The user gave something that cannot work: a recipe, a file or a call is wrong, not dgpo.

    The message holds the value, the recipe key or argument that it came from, and what would work.
    The command line prints the message alone, without a traceback.
    """


class MissingExtra(UserError):
    """A feature needs an optional dependency that is not installed.

    Args:
        package: the distribution that could not be imported, e.g. ``"rapidocr"``.
        extra: the extra of ``dgpo`` that installs it, e.g. ``"ocr"``.

    >>> raise MissingExtra("imageio-ffmpeg", "media")
    Traceback (most recent call last):
    dgpo.errors.MissingExtra: needs imageio-ffmpeg: pip install 'dgpo[media]'
    """

    def __init__(self, package: str, extra: str) -> None:
        self.package = package
        self.extra = extra
        super().__init__(f"needs {package}: pip install 'dgpo[{extra}]'")

    def __reduce__(self) -> tuple[type[MissingExtra], tuple[str, str]]:
        # errors travel between processes; the default would call the class with the message alone
        return type(self), (self.package, self.extra)


def told(error: BaseException) -> str:
    """Tell an error of code that is not ours in one line, because the report shows no traceback:
    its type, its message, and the last line of the user's own that led to it, if one did; else that
    of a library."""
    every = traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in every if not frame.filename.startswith(_OURS)]
    # a library's line, where it gave up, tells the user nothing
    theirs = [frame for frame in frames if not frame.filename.startswith(_LIBRARIES)] or frames
    where = f" ({Path(theirs[-1].filename).name}, line {theirs[-1].lineno})" if theirs else ""
    return f"{type(error).__name__}: {message(error)}{where}"


def message(error: BaseException) -> str:
    """Return the message of an error, whatever its class makes of it."""
    try:
        return str(error)
    except Exception as broken:
        return f"its message cannot be read ({type(broken).__name__})"
