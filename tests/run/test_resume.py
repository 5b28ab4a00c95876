"""Nothing may show that a run was stopped, by any algorithm."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from dgpo.registry import ALGORITHMS
from reliable import assert_same, reliable, stopping
from tiny_runs import light, rows

FAST = ("dgpo", "flow_grpo")


@pytest.fixture(autouse=True)
def _light(monkeypatch: pytest.MonkeyPatch) -> None:
    light(monkeypatch)


def stop() -> None:
    raise KeyboardInterrupt


def stopped_equals_through(folder: Path, name: str, **changes: Any) -> None:
    reliable(folder / "through", name, **changes).train()
    with pytest.raises(KeyboardInterrupt):
        reliable(folder / "stopped", name, stopping(2, stop), **changes).train()
    assert len(rows(folder / "stopped")) == 2
    run = reliable(folder / "stopped", name, resume=True, **changes)
    assert run.iteration == 2
    run.train()
    assert len(rows(folder / "stopped")) == 4
    assert_same(folder / "through", folder / "stopped")


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in ALGORITHMS]
)
def test_two_halves_are_the_whole(name: str, tmp_path: Path) -> None:
    stopped_equals_through(tmp_path, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_two_halves_are_the_whole_with_all_weights(name: str, tmp_path: Path) -> None:
    changes = {"lora": None, "train": {"iterations": 4, "lr": 1e-3}}
    stopped_equals_through(tmp_path, name, **changes)


def test_sigterm_saves_and_ends_with_0(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    short: dict[str, Any] = {"train": {"iterations": 2, "lr": 1e-2}}
    terminate = stopping(1, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit) as stopped:
        reliable(tmp_path / "stopped", reward=terminate, **short).train()
    assert stopped.value.code == 0 and signal.getsignal(signal.SIGTERM) is before
    reliable(tmp_path / "stopped", resume=True, **short).train()
    reliable(tmp_path / "through", **short).train()
    assert_same(tmp_path / "through", tmp_path / "stopped")
