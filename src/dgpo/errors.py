"""What a user did wrong, told so that the message alone is enough to put it right."""

from __future__ import annotations

import traceback
from pathlib import Path


class UserError(ValueError):
    """A mistake in what the user gave (a recipe, a file, a call), not a fault of this library.

    The message holds the value that was got, the recipe key or argument it came from, and what
    would work. The command line prints the message alone, without a traceback.
    """


class MissingExtra(UserError):
    """A feature needs an optional dependency that is not installed.

    Args:
        package: the distribution that could not be imported, e.g. ``"rapidocr"``.
        extra: the extra of ``dgpo`` that installs it, e.g. ``"ocr"``.
    """

    def __init__(self, package: str, extra: str) -> None:
        self.package = package
        self.extra = extra
        super().__init__(f"needs {package}: pip install 'dgpo[{extra}]'")

    def __reduce__(self) -> tuple[type[MissingExtra], tuple[str, str]]:
        # the default would call the class with the finished message alone and fail
        return type(self), (self.package, self.extra)


def told(error: BaseException) -> str:
    """Tell an error of code that is not ours in one line: its type, its message, and where it was
    raised, because the report shows no traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"
