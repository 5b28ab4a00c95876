"""What a run shows while it works: one live line, or plain lines when it is not at a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text


def clock(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Progress:
    """Stage, iteration, reward, spread, clipped share, samples/s and the time left.

    At a terminal it is one line that is rewritten; elsewhere (a file, a pipe) every finished
    iteration is a line, at most one in ``every`` seconds, and stages are not shown.

    Args:
        iterations: of the whole run.
        max_minutes: training time after which the run ends sooner, or None.
        console: where to write; the default is stderr, so that stdout stays free.
        every: seconds between plain lines.
        now: a clock in seconds, replaced in tests.
    """

    def __init__(
        self,
        iterations: int,
        max_minutes: float | None = None,
        console: Console | None = None,
        every: float = 10.0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console = console or Console(stderr=True)
        self._iterations = iterations
        self._limit = None if max_minutes is None else 60 * max_minutes
        self._every = every
        self._now = now
        self._last = float("-inf")
        self._stage = "starting"
        self._figures: list[str] = []
        self._live: Live | None = None

    def __enter__(self) -> Progress:
        if self.console.is_terminal:
            self._live = Live(console=self.console, refresh_per_second=4, transient=True)
            self._live.start()
            self._show()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def stage(self, name: str) -> None:
        """What is being done now: loading, rollout, reward, training, evaluating, saving."""
        self._stage = name
        self._show()

    def iteration(
        self,
        done: int,
        *,
        reward: float,
        spread: float,
        clipped: float,
        samples_per_second: float,
        trained_seconds: float,
        first: int = 0,
    ) -> None:
        """Report a finished iteration.

        Args:
            done: iterations done so far, those before a resume included.
            reward: mean reward of the iteration.
            spread: share of the groups whose members differ, in [0, 1].
            clipped: share of samples whose gradient was clipped, in [0, 1].
            samples_per_second: rolled out, rewarded and trained.
            trained_seconds: training time of this process so far.
            first: iterations done before this process started.
        """
        left = self._left(done, first, trained_seconds)
        self._figures = [
            f"iteration {done}/{self._iterations}",
            f"reward {reward:.3f}",
            f"spread {spread:.0%}",
            f"clipped {clipped:.0%}",
            f"{samples_per_second:.1f} samples/s",
            f"{clock(left)} left",
        ]
        self._show()
        finished = done >= self._iterations
        if self._live is None and (finished or self._now() - self._last >= self._every):
            self._last = self._now()
            self._print("  ".join(self._figures))

    def say(self, message: str) -> None:
        """A line that stays: an evaluation's result, a file that was written."""
        self._print(message)

    def _print(self, message: str) -> None:
        # soft_wrap: a log file's lines are not cut at a terminal's width
        self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    def _left(self, done: int, first: int, seconds: float) -> float:
        pace = seconds / max(done - first, 1)
        left = (self._iterations - done) * pace
        return left if self._limit is None else max(0.0, min(left, self._limit - seconds))

    def _show(self) -> None:
        if self._live is not None:
            text = Text("  ".join([f"{self._stage:<10}", *self._figures]), overflow="ellipsis")
            text.no_wrap = True
            self._live.update(Spinner("dots", text))
