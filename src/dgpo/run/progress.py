"""What a run shows while it works: a live line at a terminal or in a notebook, else plain lines."""

from __future__ import annotations

import time
from collections.abc import Callable
from html import escape
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text


def clock(seconds: float) -> str:
    """Write a time as hours, minutes and seconds.

    >>> clock(123), clock(3723)
    ('2:03', '1:02:03')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Progress:
    """Shows stage, iteration, reward, spread, clipped share, samples/s and the time left.

    At a terminal and in a notebook it is one line that is rewritten. Elsewhere (a file, a pipe)
    every finished iteration is a line, at most one in ``every`` seconds, and stages are not shown.

    Args:
        iterations: how many the whole run has.
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
        self._every, self._now = every, now
        self._last = float("-inf")
        self._stage, self._done = "starting", 0
        self._figures: list[str] = []
        self._line: _TerminalLine | _NotebookLine | None = None

    def __enter__(self) -> Progress:
        if self.console.is_jupyter and not self.console.quiet:
            self._line = _NotebookLine(self._iterations, self._now)
        elif self.console.is_terminal:
            self._line = _TerminalLine(self.console)
        self._show()
        return self

    def __exit__(self, *error: object) -> None:
        if self._line is not None:
            self._line.close()
            self._line = None

    def stage(self, name: str) -> None:
        """Show what is being done now: loading, rollout, reward, training, evaluating, saving."""
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
    ) -> None:
        """Report a finished iteration.

        Args:
            done: iterations done so far, those before a resume included.
            reward: mean reward of the iteration.
            spread: share of the groups whose members differ, in [0, 1].
            clipped: share of samples whose gradient was clipped, in [0, 1].
            samples_per_second: how many were rolled out, rewarded and trained on in a second.
            trained_seconds: training time so far, that before a resume included.
        """
        left = (self._iterations - done) * trained_seconds / max(done, 1)
        if self._limit is not None:
            left = max(0.0, min(left, self._limit - trained_seconds))
        self._done = done
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
        if self._line is None and (finished or self._now() - self._last >= self._every):
            self._last = self._now()
            self.say("  ".join(self._figures))

    def say(self, message: str) -> None:
        """Show a line that stays: an evaluation's result, a file that was written."""
        if self.console.is_jupyter and not self.console.quiet:
            print(message)  # stderr has a red background there, and the console an output for each
            return
        # soft_wrap: a log file's lines are not cut at a terminal's width
        self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    def _show(self) -> None:
        if self._line is not None:
            self._line.show(self._done, self._stage, self._figures)


class _TerminalLine:
    """A line at a terminal, which is gone when it is closed."""

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, refresh_per_second=4, transient=True)
        self._live.start()

    def show(self, done: int, stage: str, figures: list[str]) -> None:
        line = "  ".join([f"{stage:<10}", *figures])
        self._live.update(Spinner("dots", Text(line, no_wrap=True, overflow="ellipsis")))

    def close(self) -> None:
        self._live.stop()


class _NotebookLine:
    """A bar and a line in one output of a notebook's cell, which stays when it is closed.

    It needs no widgets, so that a saved notebook shows it too.
    """

    def __init__(self, iterations: int, now: Callable[[], float]) -> None:
        # in a notebook IPython is there, but it is no dependency of dgpo
        from IPython.display import display  # pyright: ignore

        self._iterations, self._now = iterations, now
        self._last = float("-inf")
        self._figures: list[str] = []
        self._done, self._text = 0, "starting"
        self._handle: Any = display(self._bundle(), raw=True, display_id=True)

    def show(self, done: int, stage: str, figures: list[str]) -> None:
        self._done, self._text = done, "  ".join([*figures, stage])
        self._figures = figures
        if self._now() - self._last >= 0.25:  # a browser needs time to draw
            self._update()

    def close(self) -> None:
        self._text = "  ".join(self._figures) or self._text  # nothing is being done any more
        self._update()

    def _update(self) -> None:
        self._last = self._now()
        self._handle.update(self._bundle(), raw=True)

    def _bundle(self) -> dict[str, str]:
        bar = f'<progress value="{self._done}" max="{self._iterations}"></progress>'
        text = f"{bar} <code>{escape(self._text)}</code>"
        return {"text/plain": self._text, "text/html": text}
