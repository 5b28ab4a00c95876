"""What every algorithm on noised samples must do; the rows are in table.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from algorithms.learning import Velocity, mean_reward, train
from algorithms.table import FORWARD, TRAJECTORY, Row, changed
from dgpo.algorithms import Algorithm
from dgpo.core import Forward, Groups
from dgpo.registry import ALGORITHMS, resolve
from oracles.toy import Toy, run_processes
from tiny_runs import light, rows, trainer

CLOSE = {"rtol": 1e-10, "atol": 1e-13}
COUNT, SIZE = 3, 4
every_row = pytest.mark.parametrize("row", FORWARD.values(), ids=FORWARD.keys())


class Case:
    """Three groups of four in mixed order, of which are kept the samples that are trained."""

    def __init__(self, algorithm: Algorithm) -> None:
        order = torch.randperm(COUNT * SIZE, generator=torch.Generator().manual_seed(0))
        groups = Groups(Groups.contiguous(COUNT, SIZE).index[order], SIZE, COUNT)
        self.algorithm, self.toy = algorithm, Toy(groups)
        rewards = torch.randn(COUNT * SIZE, generator=torch.Generator().manual_seed(1)).double()
        self.toy.advantages = algorithm.advantages(rewards, groups)
        size = algorithm.trained_per_group
        self.rows = torch.arange(COUNT * SIZE)
        if size is not None:
            self.rows = self.toy.advantages.nonzero()[:, 0]
        self.groups = replace(groups.subset(self.rows), size=size or SIZE)

    def __len__(self) -> int:
        return len(self.rows)

    def points(
        self, part: Tensor | None = None, groups: Groups | None = None, **changes: Any
    ) -> Forward:
        """The points of some of the samples, with the predictions that are declared."""
        part = torch.arange(len(self)) if part is None else part
        picked = self.rows[part]
        undeclared = dict.fromkeys({"ref", "old"} - self.algorithm.snapshots)
        if self.algorithm.kl_guidance is not None:
            undeclared["kl_ref"] = self.toy.xt[picked] @ (self.toy.ref + 1)
        if groups is None:
            groups = Groups(self.groups.index[part], self.groups.size, self.groups.count)
        return self.toy.points(picked, groups, **{**undeclared, **changes})

    def gradient(self, points: Forward) -> Tensor:
        return self.toy.gradient(self.algorithm.loss(points)[0])

    def at(self, policy: Tensor) -> Case:
        """The policy is put somewhere else."""
        self.toy.policy = policy.detach().clone().requires_grad_()
        return self


def test_every_registered_algorithm_has_a_row() -> None:
    kinds = {name: resolve("algorithm", name) for name in ALGORITHMS}
    assert {name for name, kind in kinds.items() if kind.points == "forward"} == set(FORWARD)
    assert {name.partition(" ")[0] for name in TRAJECTORY} == set(kinds) - set(FORWARD)
    for name, row in FORWARD.items():
        assert type(row.algorithm) is kinds[name]
    for name, kind in kinds.items():
        assert kind.name == name and kind.points == ALGORITHMS[name].points
        assert kind.contract.learns, name


@pytest.mark.parametrize(
    ("row", "algorithm"),
    [
        pytest.param(row, algorithm, id=f"{name}-{variant}")
        for name, row in FORWARD.items()
        for variant, algorithm in row.learns.items()
    ],
)
def test_reward_rises(row: Row, algorithm: Algorithm) -> None:
    start, end = mean_reward(Velocity()), mean_reward(train(algorithm, 100, row.step_each_level))
    assert start < -1.9
    assert end > start + 0.8


@every_row
def test_without_advantages_there_is_no_gradient(row: Row) -> None:
    case = Case(row.reward_part)
    nothing = torch.zeros(len(case), dtype=torch.float64)
    with torch.no_grad():
        apart = case.toy.policy - case.toy.old
    gradient = case.gradient(case.points(advantages=nothing))
    if not row.pulls_to_old:
        assert torch.equal(gradient, torch.zeros_like(gradient))
        return
    assert (gradient * apart).sum() > 0  # a step against it leads back
    case = Case(changed(row.reward_part, beta=1.0)).at(case.toy.old)
    gradient = case.gradient(case.points(advantages=nothing))
    assert torch.equal(gradient, torch.zeros_like(gradient))


@every_row
@pytest.mark.parametrize("std", ["group", "batch"])
def test_a_group_without_spread_has_no_advantage(row: Row, std: str) -> None:
    algorithm = changed(row.algorithm, advantage_std=std)
    rewards = torch.tensor([0.1] * 3 + [0.3, 0.1, 0.2], dtype=torch.float64)
    assert float(rewards[:3].sum() / 3) != 0.1  # the mean rounds, so r - mean is not enough
    advantages = algorithm.advantages(rewards, Groups.contiguous(2, 3))
    assert torch.equal(advantages[:3], torch.zeros(3, dtype=torch.float64))
    assert advantages[3] == advantages[3:].max() > 0


@every_row
def test_all_samples_that_are_trained_and_no_others_have_an_advantage(row: Row) -> None:
    size = row.algorithm.trained_per_group
    groups = Groups.contiguous(5, 6)
    rewards = torch.randint(3, (30,), generator=torch.Generator().manual_seed(2)).float()
    assert groups.spread(rewards).all()
    advantages = row.algorithm.advantages(rewards, groups)
    assert advantages.dtype == torch.float32 and advantages.isfinite().all()
    if size is not None:
        assert (advantages.reshape(5, 6) != 0).sum(1).tolist() == [size] * 5


@every_row
def test_a_small_step_fits_better_samples_better(row: Row) -> None:
    case = Case(row.reward_part)
    case.at(case.toy.old)
    points = case.points()
    gradient = case.gradient(case.points())
    case.at(case.toy.policy - 1e-4 * gradient / gradient.norm())
    after = case.points()
    moved = (after.error(after.pred) - points.error(points.pred)).detach()
    assert (points.advantages * moved).sum() < 0


@every_row
def test_the_order_of_samples_changes_nothing(row: Row) -> None:
    case = Case(row.algorithm)
    whole, _ = row.algorithm.loss(case.points())
    order = torch.randperm(len(case), generator=torch.Generator().manual_seed(5))
    renamed = torch.tensor([2, 0, 1])[case.groups.index[order]]
    mixed = case.points(order, Groups(renamed, case.groups.size, COUNT))
    permuted, _ = row.algorithm.loss(mixed)
    torch.testing.assert_close(permuted, whole, **CLOSE)
    torch.testing.assert_close(case.toy.gradient(permuted), case.toy.gradient(whole), **CLOSE)


@every_row
@pytest.mark.parametrize("size", [1, 3, 5])
def test_micro_batches_that_cut_groups_add_up(row: Row, size: int) -> None:
    case = Case(row.algorithm)
    whole = case.gradient(case.points())
    with torch.no_grad():
        weights = row.algorithm.weights(case.points())
    total, loss, figures = torch.zeros_like(whole), 0.0, {}
    for part in torch.arange(len(case)).split(size):
        given = None if weights is None else weights[part]
        points = case.points(part, case.groups.subset(part), weights=given)
        value, metrics = row.algorithm.loss(points)
        share = len(part) / len(case)
        total += share * case.toy.gradient(value)
        loss += share * float(value.detach())
        for name, metric in metrics.items():
            figures[name] = figures.get(name, 0.0) + share * float(metric)
    torch.testing.assert_close(total, whole, **CLOSE)
    value, metrics = row.algorithm.loss(case.points())
    assert loss == pytest.approx(float(value.detach()), rel=1e-10)
    assert figures == pytest.approx({n: float(m) for n, m in metrics.items()}, rel=1e-10)


@every_row
def test_two_processes_give_the_gradient_of_one(row: Row) -> None:
    case = Case(row.algorithm)
    whole = case.gradient(case.points())
    shares = torch.arange(len(case)).split([2, len(case) - 2])

    def body(rank: int, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        part = shares[rank]
        groups = Groups(case.groups.index[part], case.groups.size, case.groups.count, reduce)
        return len(part) / len(case) * case.gradient(case.points(part, groups))

    torch.testing.assert_close(sum(run_processes(body, 2)), whole, **CLOSE)


@every_row
@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_what_is_declared_is_read_and_nothing_else(row: Row, kl: float) -> None:
    algorithm = changed(row.algorithm, kl=kl)
    case = Case(algorithm)
    assert algorithm.loss(case.points())[0].isfinite()
    declared = set(algorithm.snapshots)
    if algorithm.kl_guidance is not None:
        declared.add("kl_ref")
    for name in sorted(declared):
        with pytest.raises(ValueError, match=f"no '{name}' prediction"):
            algorithm.loss(case.points(**{name: None}))


@every_row
def test_gradients_reach_the_policy_alone(row: Row) -> None:
    case = Case(row.algorithm)
    points = case.points()
    names = [name for name in ("ref", "old", "kl_ref") if getattr(points, name) is not None]
    given = {name: getattr(points, name).detach().requires_grad_() for name in names}
    loss, metrics = row.algorithm.loss(case.points(**given))
    for value in given.values():
        assert torch.autograd.grad(loss, value, allow_unused=True, retain_graph=True) == (None,)
    assert case.toy.gradient(loss).abs().max() > 0
    assert loss.dim() == 0
    assert all(value.dim() == 0 and not value.requires_grad for value in metrics.values())


def reports_a_ratio(row: Row) -> bool:
    return "ratio" in row.algorithm.loss(Case(row.algorithm).points())[1]


@pytest.mark.parametrize(
    "row", list(filter(reports_a_ratio, FORWARD.values())), ids=lambda row: row.algorithm.name
)
def test_the_ratio_is_exactly_one_for_the_policy_of_the_rollouts(row: Row) -> None:
    case = Case(row.algorithm)
    assert case.algorithm.loss(case.points())[1]["ratio"] != 1
    metrics = case.algorithm.loss(case.at(case.toy.old).points())[1]
    assert metrics["ratio"] == 1 and metrics["clipped"] == 0
    assert row.algorithm.old_moves == "iteration"
    assert all(row.algorithm.old_decay(n) == 0 for n in (0, 1, 1000))


@every_row
def test_half_precision_predictions_are_widened_first(row: Row) -> None:
    case = Case(row.algorithm)
    points = case.points()
    names = ("pred", "ref", "old", "kl_ref")
    given = {n: getattr(points, n) for n in names if getattr(points, n) is not None}
    half = {n: value.detach().bfloat16() for n, value in given.items()}
    exact = {n: value.double() for n, value in half.items()}
    single = {n: getattr(points, n).float() for n in ("x0", "noise", "xt", "target", "advantages")}
    got, metrics = row.algorithm.loss(replace(points, **single, **half))
    want, _ = row.algorithm.loss(replace(points, **exact))
    assert got.dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in metrics.values())
    assert float(got.detach()) == pytest.approx(float(want.detach()), rel=1e-4, abs=1e-5)


@every_row
def test_the_decay_of_the_old_policy_is_one(row: Row) -> None:
    decays = [row.algorithm.old_decay(n) for n in range(0, 2000, 25)]
    assert all(0 <= decay < 1 for decay in decays) and decays == sorted(decays)


@every_row
def test_settings_are_validated_described_and_frozen(row: Row) -> None:
    kind, algorithm = type(row.algorithm), row.algorithm
    assert kind.model_validate(algorithm.model_dump()) == algorithm
    assert all(setting.description for setting in kind.model_fields.values())
    with pytest.raises(ValidationError):
        kind.model_validate({"bta": 1})
    with pytest.raises(ValidationError):
        algorithm.shared_noise = False


@every_row
def test_the_documentation_names_it_and_its_settings(row: Row) -> None:
    text = (Path(__file__).parents[2] / "docs" / "algorithms.md").read_text()
    for name in (row.algorithm.name, *type(row.algorithm).model_fields):
        assert f"`{name}`" in text or f"`{name}:" in text


@every_row
def test_it_trains_a_pipeline(row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the real loop, with micro-batches that cut groups, a step for each level."""
    light(monkeypatch)
    levels = {"count": 2, "indices": (0, 2)}
    algorithm = changed(row.algorithm, timesteps=levels)
    train = {"iterations": 2, "micro_batch": 3, "optimizer_step": "timestep"}
    run = trainer(tmp_path / "run", algorithm=algorithm, train=train)
    before = [parameter.detach().clone() for parameter in run.policy.parameters()]
    run.train()
    assert len(rows(tmp_path / "run")) == 2
    moved = zip(before, run.policy.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in moved)


class Smallest(Algorithm):
    """The least that a new method writes: a name, how rewards become advantages, and the loss."""

    name: ClassVar[str] = "smallest"

    def advantages(self, rewards: Tensor, groups: Groups) -> Tensor:
        return rewards - groups.each(groups.mean(rewards))

    def loss(self, points: Forward) -> tuple[Tensor, dict[str, Tensor]]:
        error = points.error(points.pred)
        return (points.advantages.to(error) * error).mean(), {"error": error.detach().mean()}


def test_a_new_method_needs_a_name_advantages_and_a_loss_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    algorithm = Smallest.model_validate({"timesteps": {"count": 2, "indices": (0, 2)}})
    assert algorithm.snapshots == frozenset() and algorithm.old_decay(7) == 0
    light(monkeypatch)
    run = trainer(tmp_path / "run", algorithm=algorithm, train={"iterations": 1})
    run.train()
    assert len(rows(tmp_path / "run")) == 1
