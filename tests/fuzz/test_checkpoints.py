"""Checkpoints damaged at random: a whole one is found and is what was saved, or one clear error."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dgpo.training.checkpoint_files import find_checkpoint, load_checkpoint, save_checkpoint
from fuzz.parts import PROFILE, changed_bytes, value_or_error
from tiny_runs import trainer

FILES = ("tensors.safetensors", "state.json", "manifest.json")
ITERATIONS = (1, 2)


class Saved:
    """A run with two checkpoints, and what each of them holds."""

    def __init__(self, folder: Path) -> None:
        self.run = trainer(folder / "run", lora={"rank": 1, "alpha": 1})
        self.folder, self.copy = folder / "saved", folder / "copy"
        self.weights: dict[int, list[torch.Tensor]] = {}
        for iteration in ITERATIONS:
            for parameter in self.run.policy.parameters():
                parameter.data.fill_(iteration / 7)
            self.weights[iteration] = [p.detach().clone() for p in self.run.policy.parameters()]
            counters = {"iteration": iteration, "seconds": 0.0}
            save_checkpoint(self.folder, self.run.updater, counters, score=0.5)

    def fresh(self) -> Path:
        shutil.rmtree(self.copy, ignore_errors=True)
        shutil.copytree(self.folder, self.copy)
        return self.copy


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(tmp_path_factory.mktemp("checkpoints"))


def damage(data: st.DataObject, folder: Path) -> None:
    """One thing that happens to folders."""
    place = folder / f"{data.draw(st.sampled_from(ITERATIONS)):08d}"
    if not place.is_dir():
        return
    file = place / data.draw(st.sampled_from(FILES))
    kind = data.draw(
        st.sampled_from(
            ["bytes", "bytes", "bytes", "missing", "extra", "odd", "rename", "swap", "deep"]
        )
    )
    if kind == "bytes" and file.is_file():
        file.write_bytes(data.draw(changed_bytes(file.read_bytes())))
    elif kind == "missing":
        file.unlink(missing_ok=True)
    elif kind == "extra":
        (place / "notes.txt").write_text("mine")
        (
            folder / data.draw(st.sampled_from(["readme", "00000009.new", "00000009", "99999999x"]))
        ).mkdir(exist_ok=True)
    elif kind == "odd":
        text = data.draw(st.sampled_from(["", "null", "[]", "{}", '{"sha256": 3}', "\x00", "NaN"]))
        file.write_text(text)
    elif kind == "rename":
        other = folder / data.draw(st.sampled_from(["00000007", f"{place.name}.old", "kept"]))
        if not other.exists():
            place.rename(other)
    elif kind == "deep":
        file.write_text("[" * 100_000)
    elif kind == "swap" and file.is_file():
        other = folder / f"{sum(ITERATIONS) - int(place.name):08d}" / file.name
        if other.is_file():
            mine, theirs = file.read_bytes(), other.read_bytes()
            file.write_bytes(theirs)
            other.write_bytes(mine)


@PROFILE
@given(data=st.data())
def test_damaged_checkpoints(data: st.DataObject, saved: Saved) -> None:
    folder = saved.fresh()
    for _ in range(data.draw(st.integers(1, 3))):
        damage(data, folder)
    best = data.draw(st.booleans())
    found = value_or_error(lambda: find_checkpoint(folder, best=best))
    if found is None:
        return
    for parameter in saved.run.policy.parameters():
        parameter.data.zero_()
    state: Any = load_checkpoint(found.folder, saved.run.updater)
    assert state["iteration"] == found.iteration and found.iteration in ITERATIONS
    for parameter, kept in zip(
        saved.run.policy.parameters(), saved.weights[found.iteration], strict=True
    ):
        assert torch.equal(parameter, kept)
