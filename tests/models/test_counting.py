"""Work is counted where it is done: in the denoiser."""

import json

import pytest

from dgpo import Callback
from dgpo.algorithms.flow_grpo import FlowGRPO
from tiny_runs import PROMPTS, light, rows, trainer, without_times

IMAGES = 4 * 2  # of an iteration of the tiny runs
STEPS = 3


@pytest.fixture(autouse=True)
def _light(monkeypatch):
    light(monkeypatch)


def counts(folder):
    names = ("images", "forwards", "backwards")
    return [tuple(row[name] for name in names) for row in rows(folder)]


@pytest.mark.parametrize(
    ("changes", "forwards", "backwards"),
    [
        # rollouts, and at 2 levels the policy, the reference and the old policy
        ({}, STEPS + 2 * 3, 2),
        # both halves of guidance, in the rollouts alone
        ({"rollout": {"guidance_scale": 4.0}}, 2 * STEPS + 2 * 3, 2),
        # a group larger than a micro-batch is predicted a second time
        ({"train": {"micro_batch": 3}}, STEPS + 2 * 4, 2),
    ],
)
def test_totals_follow_from_the_algorithm(changes, forwards, backwards, tmp_path):
    trainer(tmp_path / "run", **changes).train()
    kept = [IMAGES * (1 - row["groups_dropped"] / 2) for row in rows(tmp_path / "run")]
    assert kept == [IMAGES, IMAGES]
    wanted = [(n * IMAGES, n * IMAGES * forwards, n * IMAGES * backwards) for n in (1, 2)]
    assert counts(tmp_path / "run") == wanted


def test_a_policy_gradient_pays_for_the_guidance_of_its_training_too(tmp_path):
    run = trainer(
        tmp_path / "run",
        algorithm=FlowGRPO(),
        rollout={"guidance_scale": 4.0},
        train={"iterations": 1},
    )
    run.train()
    # all steps but the last are trained: the policy and the reference, each with both halves
    forwards, backwards = 2 * STEPS + 2 * 2 * (STEPS - 1), 2 * (STEPS - 1)
    assert counts(tmp_path / "run") == [(IMAGES, IMAGES * forwards, IMAGES * backwards)]


def test_evaluations_are_not_counted(tmp_path):
    with_evaluations = {"eval_dataset": PROMPTS, "eval": {"every": 1, "at_start": True}}
    trainer(tmp_path / "with", **with_evaluations).train()
    trainer(tmp_path / "without").train()
    assert counts(tmp_path / "with") == counts(tmp_path / "without")


def test_a_run_that_was_resumed_has_the_same_metrics_bit_for_bit(tmp_path):
    trainer(tmp_path / "whole", train={"iterations": 3}).train()

    class StopsInTheThird(Callback):
        def on_rollout(self, state, control, **what):
            if state.iteration == 2:  # the rollout must not be counted twice
                raise KeyboardInterrupt

    changes = {"train": {"iterations": 3}, "checkpoint": {"every": 2}}
    run = trainer(tmp_path / "parts", **changes, callbacks=[StopsInTheThird()])
    with pytest.raises(KeyboardInterrupt):
        run.train()
    trainer(tmp_path / "parts", train={"iterations": 3}, resume=True).train()
    assert without_times(tmp_path / "parts") == without_times(tmp_path / "whole")


def test_nothing_is_left_on_the_denoiser(tmp_path):
    run = trainer(tmp_path / "run")
    (denoiser,) = run.model.denoisers.values()
    before = len(denoiser._forward_hooks)
    run.train()
    assert len(denoiser._forward_hooks) == before
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["images"]
