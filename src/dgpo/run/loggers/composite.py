"""All loggers of a run behind one: it hands everything on and survives what they raise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image

from dgpo.errors import UserError, told
from dgpo.registry import resolve
from dgpo.run.loggers.base import LoggedRun, Logger
from dgpo.user_classes import make, refuse_misspelt, refuse_options, refuse_signatures
from dgpo.user_code import own, user_code

FAILURES = (Exception, SystemExit)
"""What a logger may raise without ending the run; Ctrl-C and SIGTERM are none of them."""


def make_loggers(entries: Sequence[str | Mapping[str, Mapping[str, Any]]]) -> dict[str, Logger]:
    """Make the loggers that ``run.loggers`` names, without beginning them.

    Args:
        entries: names, or ``{name: options}`` of one name each.

    Raises:
        UserError: a name that cannot be resolved, a class that is no :class:`Logger`, or options
            that it does not take.
        MissingExtra: its package is not installed.
    """
    made: dict[str, Logger] = {}
    for entry in entries:
        name, options = (entry, {}) if isinstance(entry, str) else next(iter(entry.items()))
        kind = resolve("logger", name)
        if not (isinstance(kind, type) and issubclass(kind, Logger)):
            called = getattr(kind, "__name__", type(kind).__name__)
            raise UserError(
                f"run.loggers: {name!r}: {called} is no logger; derive a class from "
                "dgpo.run.loggers.Logger"
            )
        where = f"run.loggers: {name!r}"
        refuse_misspelt(kind, Logger, where)
        refuse_signatures(kind, Logger, where)
        refuse_options(kind, options, where)
        made[name] = make(kind, options, f"logger {name!r}", where)
    return made


class Loggers(Logger):
    """Calls every hook of every logger.

    A logger that raises is left alone from then on, and the run goes on: a curve that nobody can
    send is no reason to lose the training.

    Args:
        loggers: by name.
        tell: is called with a sentence about a logger that is left alone; may be replaced.
    """

    def __init__(self, loggers: Mapping[str, Logger], tell: Callable[[str], None]) -> None:
        self._loggers = dict(loggers)
        self.tell = tell

    def begin(self, run: LoggedRun) -> None:
        """Open all logs.

        Raises:
            UserError: one cannot be opened and the run is new. The logs that were opened before it
                are closed. A run that goes on leaves such a logger alone.
        """
        begun: dict[str, Logger] = {}
        try:
            for name, logger in self._loggers.items():
                try:
                    with user_code(f"logger {name!r}"):
                        logger.begin(run)
                    begun[name] = logger
                except FAILURES as error:
                    if run.resumed_after is None:
                        raise UserError(
                            f"run.loggers: {name!r} could not begin: {told(error)}. Put it right, "
                            "or leave the logger out"
                        ) from error
                    self._leave(name, error)
        except BaseException:
            self._loggers = begun
            self.end(failed=True)
            raise
        self._loggers = begun

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._each("scalars", values, step)

    def image(self, name: str, image: Image.Image, step: int) -> None:
        self._each("image", name, image, step)

    def table(
        self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int
    ) -> None:
        self._each("table", name, columns, rows, step)

    def end(self, failed: bool) -> None:
        self._each("end", failed)

    def _each(self, hook: str, *given: Any) -> None:
        for name, logger in tuple(self._loggers.items()):
            try:
                with user_code(f"logger {name!r}"):
                    getattr(logger, hook)(*own(given))
            except FAILURES as error:
                del self._loggers[name]
                self._leave(name, error)

    def _leave(self, name: str, error: BaseException) -> None:
        self.tell(f"logger {name!r} failed, and the run goes on without it: {told(error)}")
