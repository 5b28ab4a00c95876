"""SIGTERM and Ctrl-C at lines of dgpo's own code drawn by lot: nothing shows afterwards."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

import dgpo
from dgpo.trainer import Trainer
from reliable import assert_same
from tiny_runs import PROMPTS, TIMESTEPS, light, trainer

STOPS = int(os.environ.get("DGPO_STOPS", "16"))
"""Of both signals together, over all kinds of runs."""
GRACE = 30.0
"""Seconds that launchers wait after a signal."""
OURS = str(Path(dgpo.__file__).parent)
FILES = ("metrics.jsonl", "evaluations.jsonl", "warnings.jsonl")
RUN: dict[str, Any] = {
    "algorithm": {"timesteps": TIMESTEPS},
    "eval_dataset": PROMPTS[:1],
    "eval": {"at_start": True, "every": 1},
    "ema": {"decay": 0.5, "every": 9},  # more than all steps, which is warned of
    "checkpoint": {"every": 1},
}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"train": {"lr": 1e-2, "optimizer_step": "timestep", "micro_batch": 3}},
    "full": {"lora": None, "train": {"lr": 1e-3}},
    "ahead": {"rollout": {"ahead": 1, "batch": 4}, "ema": {"decay": 0.5, "every": 2}},
    "flow_grpo": {"algorithm": {"name": "flow_grpo", "updates": 2}},
}
Line = tuple[str, int]


class StopAt:
    """A tracer that counts how often each line of dgpo runs while signals are heard, and sends one
    at one of them."""

    def __init__(self, line: Line | None = None, time: int = 0, number: int = 0) -> None:
        self.counts: Counter[Line] = Counter()
        self._line, self._time, self._number = line, time, number
        self.sent: float | None = None

    def __call__(self, frame: Any, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.startswith(OURS):
            return None
        heard = signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        if event == "line" and self.sent is None and heard:
            here = frame.f_code.co_filename, frame.f_lineno
            self.counts[here] += 1
            if here == self._line and self.counts[here] == self._time:
                self.sent = monotonic()
                signal.raise_signal(self._number)
        return self

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        sys.settrace(self)
        try:
            yield
        finally:
            sys.settrace(None)


def start(folder: Path, kind: str, resume: bool = False) -> Trainer:
    return trainer(folder, resume=resume, **{**RUN, **KINDS[kind]})


def stop_and_go_on(folder: Path, kind: str, stop: StopAt, number: int) -> float:
    """Train with a stop in it, then the rest: in this process after Ctrl-C, else in another trainer
    as another process would. Returns the seconds that the stop took."""
    run = start(folder, kind)
    ended = pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit)
    with ended as error, stop.watching():
        run.train()
    assert stop.sent is not None and getattr(error.value, "code", 0) == 0
    took = monotonic() - stop.sent
    if number == signal.SIGINT and run.updater.at_rest:
        del error  # whose frames hold what they have cut off
        run.train()
    else:
        start(folder, kind, resume=(folder / "recipe.yaml").exists()).train()
    return took


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_stopped_at_any_line(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    light(monkeypatch)
    through, counter, chance = tmp_path / "through", StopAt(), random.Random(kind)
    run = start(through, kind)
    with counter.watching():
        run.train()
    files = [file for file in FILES if (through / file).exists()]
    lines, longest = sorted(counter.counts), 0.0
    assert len(lines) > 1000
    for turn in range(STOPS // len(KINDS)):
        number = (signal.SIGTERM, signal.SIGINT)[turn % 2]
        line = chance.choice(lines)
        stop = StopAt(line, chance.randint(1, counter.counts[line]), number)
        folder = tmp_path / str(turn)
        where = f"{signal.Signals(number).name} at {line}"
        try:
            longest = max(longest, stop_and_go_on(folder, kind, stop, number))
            assert_same(through, folder, tuple(files))
        except BaseException as error:
            raise AssertionError(f"{where}: {type(error).__name__} {error}") from error
        assert [f for f in FILES if (folder / f).exists()] == files, where
    print(f"{kind}: {turn + 1} stops at {len(lines)} lines, the longest took {longest:.1f} s")
    assert longest < GRACE
