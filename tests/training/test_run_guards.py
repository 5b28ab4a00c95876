"""Guards: each is provoked in a run or by rows that it reads."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dgpo.errors import UserError
from dgpo.recipe import Recipe
from dgpo.recipe.sections import GuardSettings
from dgpo.rewards.shipped.stand_in import brightness
from dgpo.training.callbacks import TrainerState
from dgpo.training.run_guards import Guards, foreseen
from tiny_runs import PROMPTS, TIMESTEPS, Spy, light, rows, trainer


@pytest.fixture(autouse=True)
def _light(monkeypatch: pytest.MonkeyPatch) -> None:
    light(monkeypatch)


class Broken(Spy):
    """DGPO whose loss is not finite in some calls; two levels are two calls and one step."""

    bad: tuple[int, ...] = ()

    def loss(self, points: Any) -> Any:
        number = len(self.seen)
        loss, figures = super().loss(points)
        return loss * (math.nan if number in self.bad else 1.0), figures


def broken(*bad: int) -> Any:
    Spy.seen.clear()
    return Broken(timesteps=TIMESTEPS, bad=bad)  # pyright: ignore[reportArgumentType]


def test_a_step_that_is_not_finite_is_left_out_and_counted(tmp_path: Path) -> None:
    # call 0 (no step), then 1 and 2 are an iteration of which the second is bad, then 3 and 4
    run = trainer(tmp_path, algorithm=broken(0, 2), train={"iterations": 3})
    run.train()
    found = rows(tmp_path)
    assert [row.get("nonfinite_steps", 0) for row in found] == [1, 1, 0]
    assert found[0]["loss"] is None and found[2]["loss"] is not None
    assert run.updater.step == 1 and run.updater.nonfinite == 0
    assert all(bool(torch.isfinite(p).all()) for p in run.policy.parameters())
    warned = rows(tmp_path, "warnings.jsonl")
    assert [row["iteration"] for row in warned] == [1, 2, 3]
    assert "of the average" in warned[2]["warning"]  # which has moved once
    assert "1 optimiser steps were left out" in warned[0]["warning"]


def test_steps_in_a_row_that_are_not_finite_stop_the_run_with_the_batch(tmp_path: Path) -> None:
    run = trainer(
        tmp_path, algorithm=broken(*range(9)), guards={"nonfinite": 2}, train={"iterations": 9}
    )
    before = [p.detach().clone() for p in run.policy.parameters()]
    with pytest.raises(UserError, match=r"iteration 2: the loss is nan.*2 times.*The batch is in"):
        run.train()
    place = tmp_path / "nonfinite" / "00000002.safetensors"
    assert run.updater.at_rest  # no weight has moved
    saved, said = load_file(place), json.loads(place.with_suffix(".json").read_text())
    assert saved["x0"].shape[0] == len(saved["advantages"]) == 8
    assert said["prompts"] == [p.text for p in run.sampler.at(1)] and said["not_finite"] == []
    for mine, theirs in zip(before, run.policy.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_what_is_not_finite_takes_the_place_of_no_checkpoint(tmp_path: Path, capsys: Any) -> None:
    every: dict[str, Any] = {
        "train": {"iterations": 9},
        "checkpoint": {"every": 1, "keep_last": 2},
        "guards": {"nonfinite": 4},
    }

    def left(folder: Path) -> list[str]:
        return sorted(place.name for place in (folder / "checkpoints").iterdir())

    # two good iterations of two calls each, and then none
    bad = broken(*range(4, 99))
    with pytest.raises(UserError, match="the loss is nan"):
        trainer(tmp_path / "losses", algorithm=bad, **every).train()
    assert left(tmp_path / "losses") == ["00000001", "00000002"]

    # a stop between them goes back to the iterations before
    calls = itertools.count()

    def stopping(images: Any, prompts: Any) -> list[float]:
        if next(calls) == 4:  # the trial, three iterations, and now
            raise KeyboardInterrupt
        return brightness(images, prompts)

    stopping.__name__ = "brightness"
    bad = broken(*range(4, 99))
    run = trainer(tmp_path / "stopped", stopping, algorithm=bad, **every)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert run.state.not_saved == {3}
    assert left(tmp_path / "stopped") == ["00000001", "00000002"]
    assert "stopped after a step that was not finite" in " ".join(capsys.readouterr().err.split())

    run = trainer(tmp_path / "weights", algorithm=broken(), **every)
    steps, step = itertools.count(1), run.updater.optimizer.step

    def burst(*args: Any) -> Any:
        done = step(*args)
        if next(steps) == 3:
            run.policy.parameters()[0].data.fill_(math.inf)
        return done

    run.updater.optimizer.step = burst  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(UserError, match=r"iteration 3: the trained weights are not finite.*lr"):
        run.train()
    assert left(tmp_path / "weights") == ["00000001", "00000002"]


def test_a_score_whose_weights_were_not_saved_is_no_bar_for_others() -> None:
    rows = [
        {"iteration": done, "overall": score} for done, score in ((10, 0.7), (20, 0.9), (30, 0.8))
    ]
    state = TrainerState(Recipe(), iteration=30, log_history=rows)
    assert not state.is_best
    state.not_saved.add(20)
    assert state.is_best and not replace(state, iteration=20).is_best


def test_a_run_that_goes_on_knows_whose_weights_were_not_saved(tmp_path: Path) -> None:
    """The best score is that of the second iteration, whose step was left out; the fourth is the
    best of those that may be saved."""
    scores = {1: 0.5, 2: 0.9, 3: 0.6, 4: 0.7, 5: 0.1}
    runs: list[Any] = []

    def judge(images: Any, prompts: Any) -> list[float]:
        done = runs[-1].iteration
        if len(images) == 2:  # the held-out prompts
            return [scores.get(done, 0.0)] * 2
        if len(runs) == 1 and done == 3:
            raise KeyboardInterrupt
        return brightness(images, prompts)

    for bad, resume in (((2, 3), False), ((), True)):
        runs.append(
            trainer(
                tmp_path,
                judge,
                algorithm=broken(*bad),
                eval_dataset=PROMPTS[:2],
                eval={"every": 1, "at_start": True},
                train={"iterations": 5, "lr": 1e-2},
                checkpoint={"every": 0, "keep_last": 1, "keep_best": 1},
                resume=resume,
            )
        )
        if resume:
            runs[-1].train()
            continue
        with pytest.raises(KeyboardInterrupt):
            runs[-1].train()
        assert runs[-1].iteration == 3 and runs[-1].state.not_saved == {2}
    names = sorted(place.name for place in (tmp_path / "checkpoints").iterdir())
    assert names == ["00000004", "00000005"]


def test_equal_rewards_warn_and_may_stop_the_run(tmp_path: Path) -> None:
    def equal(images: Any, prompts: Any) -> list[float]:
        return [1.0] * len(images)

    settings: dict[str, Any] = {"train": {"iterations": 5}}
    trainer(tmp_path / "on", equal, guards={"collapse": 2}, **settings).train()
    assert [row["iteration"] for row in rows(tmp_path / "on", "warnings.jsonl")] == [2, 4]
    assert len(rows(tmp_path / "on")) == 5
    trainer(tmp_path / "stop", equal, guards={"collapse": 2, "stop": True}, **settings).train()
    assert len(rows(tmp_path / "stop")) == 2
    # it is stopped still, and goes on if it is told to
    again = trainer(tmp_path / "stop", equal, resume=True, guards={"collapse": 2}, **settings)
    again.train()
    assert len(rows(tmp_path / "stop")) == 5
    assert (tmp_path / "stop/warnings.jsonl").read_text() == (
        tmp_path / "on/warnings.jsonl"
    ).read_text()


def watch(**settings: Any) -> Guards:
    return Guards(GuardSettings(**settings), groups=2, trained=["reward"])


def test_a_measure_that_is_not_trained_falls() -> None:
    def said(*values: float, **settings: Any) -> list[int]:
        guards = watch(falling=2, **settings)
        found = [
            guards.evaluation({"rewards": {"quality": v, "reward": -v, "none": None}})
            for v in values
        ]
        return [i for i, texts in enumerate(found) if texts]

    assert said(0.5, 0.4, 0.3, 0.2) == [2]
    assert said(0.5, 0.4, 0.45, 0.3) == []  # not in a row
    assert said(0.5, 0.9, 0.8, 0.7) == []  # still above the first
    guards = watch(falling=2, stop=True)
    for value in (0.5, 0.4):
        guards.evaluation({"rewards": {"quality": value}})
        assert guards.reason_to_stop is None
    guards.evaluation({"rewards": {"quality": 0.3}})
    assert "quality fell in 2 evaluations" in str(guards.reason_to_stop)


def test_a_spike_of_the_gradient_norm() -> None:
    guards = watch()
    for norm in (1.0, 1.1, 0.9, None, 1.0, 1.0):
        assert not guards.iteration({"grad_norm": norm})
    (text,) = guards.iteration({"grad_norm": 30.0})
    assert "30 times the usual 1" in text
    assert not guards.iteration({"grad_norm": 9.0})  # one spike does not become the usual
    assert not watch(gradient_spike=0).iteration({"grad_norm": 1e9})


def test_a_saturated_clip() -> None:
    guards = watch()
    found = [bool(guards.iteration({"clipped": 0.95})) for _ in range(20)]
    assert [i for i, said in enumerate(found, 1) if said] == [10, 20]
    assert not guards.iteration({"clipped": 0.5})
    assert not any(guards.iteration({"clipped": 0.95}) for _ in range(9))
    # a run that goes on counts on
    rows = [{"clipped": 0.95}] * 9
    after = Guards(GuardSettings(), groups=2, trained=[], rows=rows)
    assert after.iteration({"clipped": 0.95})


class Loud(Spy):
    """DGPO whose loss is a thousand times too large in some calls; one level is one call."""

    loud: tuple[int, ...] = ()

    def loss(self, points: Any) -> Any:
        number = len(self.seen)
        loss, figures = super().loss(points)
        return loss * (1000.0 if number in self.loud else 1.0), figures


def test_a_run_whose_gradient_spikes_says_so(tmp_path: Path) -> None:
    Spy.seen.clear()
    one: dict[str, Any] = {"count": 1, "indices": (0, 2)}
    loud: Any = Loud(timesteps=one, loud=(6,))  # pyright: ignore[reportArgumentType]
    run = trainer(tmp_path, algorithm=loud, train={"iterations": 8, "lr": 1e-4})
    run.train()
    norms = [row["grad_norm"] for row in rows(tmp_path)]
    (warned,) = rows(tmp_path, "warnings.jsonl")
    assert warned["iteration"] == 7 and norms[6] == max(norms)
    assert f"gradient norm {norms[6]:.3g}" in warned["warning"]
    assert "times the usual" in warned["warning"]


def test_a_run_whose_clip_is_saturated_says_so(tmp_path: Path) -> None:
    """The old policy stays almost where it was, and the policy may not leave it."""
    own: dict[str, Any] = {"clip": 1e-9, "old_decay_max": 0.99, "old_decay_rate": 1.0}
    algorithm = {"timesteps": {"count": 1, "indices": (0, 2)}, **own}
    run = trainer(tmp_path, algorithm=algorithm, guards={"clipped": 0.1}, train={"iterations": 14})
    run.train()
    shares = [row["clipped"] for row in rows(tmp_path)]
    tenth = next(n for n in range(10, 15) if min(shares[n - 10 : n]) >= 0.1)
    (warned,) = (row for row in rows(tmp_path, "warnings.jsonl") if "clipped" in row["warning"])
    assert warned["iteration"] == tenth and "10 iterations of 10% or more" in warned["warning"]


@pytest.mark.parametrize(
    ("name", "precision", "told"),
    [
        ("sd35m-ocr-cfgfree-ema", "bfloat16", True),
        ("sd35m-ocr-cfgfree-ema", "float32", False),
        ("sd35m-ocr-cfgfree", "bfloat16", False),
        ("pocket-geneval", "bfloat16", False),  # no clip
    ],
)
def test_a_clip_below_the_rounding_of_predictions_is_told(
    name: str, precision: str, told: bool
) -> None:
    said = foreseen(Recipe.load(name, [f"precision={precision}"]))
    assert bool(said) is told
    if told:
        (text,) = said
        assert text.startswith(
            "algorithm.clip = 1e-05: predictions in bfloat16 resolve about 3e-05"
        )


JUDGES = """
from itertools import chain, repeat
# the first is the trial, the second the base model
SCORES = chain((0.1, 0.1, 0.5, 0.4, 0.3), repeat(0.0))
SHARPNESS = chain((1.0, 1.0, 1.1, 0.9, 0.8), repeat(0.0))
def score(images, prompts):
    return [next(SCORES)] * len(images)
def sharpness(images, prompts):
    return [next(SHARPNESS)] * len(images)
"""


def test_a_falling_measure_ends_a_run_with_the_best(tmp_path: Path) -> None:
    file, folder = tmp_path / "judges.py", tmp_path / "run"
    file.write_text(JUDGES)
    run = trainer(
        folder,
        eval_dataset=PROMPTS[:2],
        eval={"every": 1, "at_start": True, "metrics": [f"{file}:score", f"{file}:sharpness"]},
        guards={"falling": 2, "stop": True},
        train={"iterations": 9, "lr": 1e-2},
    )
    run.train()
    assert [row["iteration"] for row in rows(folder)] == [1, 2, 3]
    (warned,) = rows(folder, "warnings.jsonl")
    assert warned["iteration"] == 3
    assert "sharpness, which is not trained, fell in 2 evaluations in a row" in warned["warning"]
    best = load_file(folder / "checkpoints/00000001/tensors.safetensors")
    last = load_file(folder / "checkpoints/00000003/tensors.safetensors")
    for name, tensor in run.policy.state_dict().items():
        assert torch.equal(tensor, best[name]), name
    assert any(not torch.equal(best[name], last[name]) for name in best)
    card = (folder / "README.md").read_text()
    assert "after 1 iterations" in card and "**0.500**" in card


def test_an_early_stop_saves_the_weights_of_the_best(tmp_path: Path) -> None:
    """The reward collapses after the third iteration; the best score is that of the second."""
    scores = iter([0.1, 0.2, 0.9, 0.4])

    def reward(images: Any, prompts: Any) -> list[float]:
        if len(images) == 2:  # the held-out prompts
            return [run_scores[0]] * 2
        return [1.0] * len(images) if run.iteration >= 3 else brightness(images, prompts)

    run_scores = [0.0]
    run = trainer(
        tmp_path,
        reward,
        eval_dataset=PROMPTS[:2],
        eval={"every": 1, "at_start": True},
        guards={"collapse": 2, "stop": True},
        train={"iterations": 9, "lr": 1e-2},
    )
    right = run._held_out.score

    def score(*given: Any) -> Any:
        run_scores[0] = next(scores, 0.3)
        return right(*given)

    run._held_out.score = score  # pyright: ignore[reportAttributeAccessIssue]
    run.train()
    assert len(rows(tmp_path)) == 5
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["00000002", "00000005"]
    last = (tmp_path / "checkpoints/00000005/tensors.safetensors").read_bytes()
    card = (tmp_path / "README.md").read_text()
    assert "after 2 iterations" in card and "**0.900**" in card and "0.300" not in card
    best = load_file(tmp_path / "checkpoints/00000002/tensors.safetensors")
    for name, tensor in run.policy.state_dict().items():
        assert torch.equal(tensor, best[name]), name
    run.train()  # there is nothing left to do, and nothing is overwritten
    assert (tmp_path / "checkpoints/00000005/tensors.safetensors").read_bytes() == last
    assert (tmp_path / "README.md").read_text() == card


def test_a_score_that_is_no_number_ends_no_run(tmp_path: Path) -> None:
    run = trainer(
        tmp_path,
        brightness,
        eval_dataset=PROMPTS[:2],
        eval={"every": 1, "at_start": True},
        train={"iterations": 2},
    )
    right, calls = run._held_out.score, iter((1.0, math.nan, 1.0))

    def score(*given: Any) -> Any:
        return replace(right(*given), overall=next(calls))

    run._held_out.score = score  # pyright: ignore[reportAttributeAccessIssue]
    run.train()
    assert [row["overall"] for row in rows(tmp_path, "evaluations.jsonl")] == [1.0, None, 1.0]
    assert "from **1.000** to **1.000**" in (tmp_path / "README.md").read_text()


def test_groups_that_were_lost_do_not_hide_a_collapse() -> None:
    guards = watch(collapse=2)
    assert not guards.iteration({"groups_dropped": 1, "groups_skipped": 1})
    assert guards.iteration({"groups_dropped": 2, "groups_skipped": 0})
    assert not guards.iteration({"groups_dropped": 0, "groups_skipped": 2})  # nothing was scored
    assert guards._collapsed == 0
