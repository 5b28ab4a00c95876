"""What the loggers to a tracker's package have in common; the extra ``trackers`` installs these."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from PIL import Image

from dgpo.errors import MissingExtra, UserError
from dgpo.registry import nearest
from dgpo.run.loggers.base import LoggedRun, Logger

_OURS = ("config", "id", "resume")
"""Arguments of a tracker's ``init`` that the run itself gives."""


class PackageLogger(Logger):
    """A logger to a tracker whose package has ``init``, ``Image`` and ``Table``.

    Args:
        options: keyword arguments of the package's ``init``.

    Raises:
        MissingExtra: the package is not installed.
        UserError: ``init`` has no argument of such a name, or the run itself gives it.
    """

    name: ClassVar[str]
    """The package's name, which is the logger's too."""

    def __init__(self, **options: Any) -> None:
        try:
            self._package = importlib.import_module(self.name)
        except ImportError as error:
            raise MissingExtra(self.name, "trackers") from error
        self._options = options
        self._run: Any = None
        taken = inspect.signature(self._package.init).parameters.values()
        names = {one.name for one in taken if one.kind is not one.VAR_KEYWORD}
        valid = sorted(names.difference(_OURS))
        for key in options:
            if key not in valid:
                why = "the run gives it" if key in _OURS else f"unknown{nearest(key, valid)}"
                raise UserError(
                    f"run.loggers.{self.name}.{key}: {why}; options are arguments of "
                    f"{self.name}.init: {', '.join(valid)}"
                )

    def begin(self, run: LoggedRun) -> None:
        self._run = self._package.init(**self._init(run), config=dict(run.config))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._log(dict(values), step)

    def image(self, name: str, image: Image.Image, step: int) -> None:
        self._log({name: self._package.Image(image)}, step)

    def table(
        self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int
    ) -> None:
        self._log({name: self._table(list(columns), [list(row) for row in rows])}, step)

    def end(self, failed: bool) -> None:
        self._run.finish()

    def _init(self, run: LoggedRun) -> dict[str, Any]:
        """The arguments of ``init`` but for the config."""
        raise NotImplementedError

    def _log(self, values: dict[str, Any], step: int) -> None:
        self._run.log(values, step=step)

    def _table(self, columns: list[str], rows: list[list[Any]]) -> Any:
        return self._package.Table(columns=columns, data=rows)
