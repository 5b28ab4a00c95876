"""Training on groups that were ranked before: it is the online update, bit by bit, on given x0."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from algorithms.table import FORWARD, changed
from dgpo.algorithms import FlowGRPO
from dgpo.errors import UserError
from dgpo.models.pipeline.adapter import PipelineModel
from dgpo.models.policy import Policy
from dgpo.preferences import GroupWriter
from dgpo.prompts import Prompt, PromptSampler
from dgpo.recipe import Recipe
from dgpo.rewards import load_rewards
from dgpo.rewards.shipped.stand_in import brightness
from dgpo.trainer import Trainer
from dgpo.training.batch import Batch
from dgpo.training.collector import Collector
from dgpo.training.forward_rounds import old_is_policy
from dgpo.training.offline import RankedCollector, picked, ranked_prompts
from dgpo.training.updater import Updater
from families.tiny import sd3_small
from reliable import assert_same
from tiny_runs import PROMPTS, TIMESTEPS, light, rows, settings

SIZE, COUNT = 4, 2


@pytest.fixture(autouse=True)
def _light(monkeypatch: pytest.MonkeyPatch) -> None:
    light(monkeypatch)


def noise(seed: int) -> Image.Image:
    pixels = torch.randint(256, (16, 16, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    writer = GroupWriter(tmp_path / "groups")
    for number, prompt in enumerate(PROMPTS[:3]):
        images = [noise(10 * number + place) for place in range(SIZE)]
        writer.add(prompt, images, [0.25 * ((place + number) % SIZE) for place in range(SIZE)])
    return writer.folder


def recipe_of(folder: Path | None, **changes: Any) -> Recipe:
    data = {} if folder is None else {"preferences": str(folder)}
    return Recipe.from_dict(settings(**{"group_size": SIZE, "data": data, **changes}))


class Case:
    """A policy on its way, and what it collects online."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.model = PipelineModel(sd3_small(), call=recipe.rollout.call)
        self.policy = Policy(self.model, recipe.lora, seed=0)
        generator = torch.Generator().manual_seed(1)
        for tensor in (*self.policy.parameters(), *self.policy.old.tensors):
            tensor.data += 0.05 * torch.randn(tensor.shape, generator=generator)
        self.updater = Updater(self.policy, recipe)

    def updated(self, batch: Batch) -> tuple[dict[str, float], list[Tensor]]:
        figures = self.updater.update(batch, iteration=0)
        return figures, [p.detach().clone() for p in self.policy.parameters()]


@pytest.mark.parametrize("name", ["dgpo", "diffusion_dpo"])
def test_a_recorded_group_gives_the_online_update_bit_by_bit(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    algorithm = {"name": name, "timesteps": TIMESTEPS}
    online = Case(recipe_of(None, algorithm=algorithm))
    seen: dict[str, Any] = {}

    def reward(images: list[Image.Image], prompts: list[str]) -> list[float]:
        seen["images"], seen["rewards"] = images, brightness(images, prompts)
        return seen["rewards"]

    prompts = [Prompt(text) for text in PROMPTS[:COUNT]]
    rewards = load_rewards([reward])
    found = Collector(online.recipe, online.policy, rewards, lambda _: prompts)(0).batch
    assert found is not None

    writer = GroupWriter(tmp_path / "groups")
    for group, prompt in enumerate(prompts):
        part = slice(group * SIZE, (group + 1) * SIZE)
        writer.add(prompt.text, seen["images"][part], seen["rewards"][part])
    offline = Case(recipe_of(tmp_path / "groups", algorithm=algorithm))
    sampler = PromptSampler(ranked_prompts(offline.recipe), COUNT, seed=0)
    monkeypatch.setattr(sampler, "at", lambda iteration: sampler.prompts)  # in the online order
    collector = RankedCollector(offline.model, offline.recipe, sampler, None)
    batch = collector(0).batch
    assert batch is not None
    for one, other in zip(batch.levels, found.levels, strict=True):
        assert one.sigma == other.sigma and torch.equal(one.timestep, other.timestep)
    for key in ("advantages", "positions"):
        assert torch.equal(getattr(batch, key), getattr(found, key))
    assert torch.equal(batch.groups.index, found.groups.index) and batch.total == found.total
    # the VAE and eight bits have lost a part of x0: with the recorded one the updates are equal
    assert batch.x0.shape == found.x0.shape and not torch.equal(batch.x0, found.x0)
    figures, weights = online.updated(found)
    same, moved = offline.updated(replace(batch, x0=found.x0))
    assert figures == same
    assert all(torch.equal(a, b) for a, b in zip(weights, moved, strict=True))


@pytest.mark.parametrize("row", FORWARD.values(), ids=FORWARD.keys())
def test_every_algorithm_on_noised_samples_trains_offline(
    row: Any, folder: Path, tmp_path: Path
) -> None:
    algorithm = changed(row.algorithm, timesteps={"count": 2, "indices": (0, 2)})
    run = trained(tmp_path / "run", folder, algorithm=algorithm)
    before = [p.detach().clone() for p in run.policy.parameters()]
    run.train()
    found = rows(tmp_path / "run")
    assert [row["images"] for row in found] == [0, 0]
    trained_rows = COUNT * (algorithm.trained_per_group or SIZE)
    shared = "old" in algorithm.snapshots and old_is_policy(algorithm, 0)  # one pass serves both
    passes = 1 + len(algorithm.snapshots) - shared + 2 * (algorithm.kl_guidance is not None)
    # two levels, and not one denoiser evaluation for a rollout
    assert found[0]["forwards"] == 2 * trained_rows * passes
    assert found[0]["backwards"] == 2 * trained_rows
    assert found[0]["reward/preferences"] == found[0]["reward_mean"] == pytest.approx(0.375)
    moved = zip(before, run.policy.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in moved)


def trained(run: Path, folder: Path, resume: bool = False, **given: Any) -> Trainer:
    algorithm = given.pop("algorithm", None)
    recipe = settings(
        **{
            "group_size": SIZE,
            "data": {"preferences": str(folder)},
            **given,
            "run": {"dir": str(run)},
        }
    )
    return Trainer(model=sd3_small(), algorithm=algorithm, recipe=recipe, resume=resume)


@pytest.mark.parametrize("name", ["dgpo", "diffusion_dpo"])
def test_two_halves_are_the_whole(name: str, folder: Path, tmp_path: Path) -> None:
    """Three groups, two an iteration: the second half begins in the middle of an epoch."""
    changes: dict[str, Any] = {
        "algorithm": FORWARD[name].algorithm,
        "train": {"iterations": 3, "lr": 1e-2, "lr_schedule": "cosine"},
        "data": {"preferences": str(folder), "pick": "random"},
        "group_size": 3,
        "checkpoint": {"every": 1},
    }
    changes["algorithm"] = changed(changes["algorithm"], timesteps=TIMESTEPS)
    trained(tmp_path / "through", folder, **changes).train()
    collect_one = RankedCollector.__call__

    def interrupt(collector: RankedCollector, iteration: int) -> Any:
        if iteration == 2:
            raise KeyboardInterrupt
        return collect_one(collector, iteration)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RankedCollector, "__call__", interrupt)
        trained(tmp_path / "stopped", folder, **changes).train()
    run = trained(tmp_path / "stopped", folder, resume=True, **changes)
    assert run.iteration == 2
    run.train()
    assert_same(tmp_path / "through", tmp_path / "stopped")


def test_which_pictures_of_a_larger_group_are_compared() -> None:
    rewards = [0.5, 0.1, 0.9, 0.1, 0.7]
    generator = torch.Generator().manual_seed(0)
    assert picked(rewards, 2, "extremes", generator) == [2, 1]
    assert picked(rewards, 4, "extremes", generator) == [2, 1, 4, 3]
    assert picked(rewards, 5, "extremes", generator) == [2, 1, 4, 3, 0]
    assert picked(rewards, 5, "all", generator) == [0, 1, 2, 3, 4]
    drawn = {tuple(picked(rewards, 3, "random", generator)) for _ in range(200)}
    assert len(drawn) == 10 and all(list(one) == sorted(set(one)) for one in drawn)


def test_groups_that_do_not_fit_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"group 1 .* has 4 pictures and group_size = 6; lower"):
        ranked_prompts(recipe_of(folder, group_size=6))
    with pytest.raises(UserError, match=r"has 4 pictures and group_size = 2; set data.pick"):
        ranked_prompts(recipe_of(folder, group_size=2))
    pairs = recipe_of(folder, group_size=2, data={"preferences": str(folder), "pick": "extremes"})
    assert len(ranked_prompts(pairs)) == 3
    with pytest.raises(UserError, match=r"16 x 16 pixels, and 32 x 16 are wanted"):
        ranked_prompts(recipe_of(folder, rollout={"call": {"width": 32, "height": 16}}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"algorithm": FlowGRPO()}, "flow_grpo learns from the steps of its own"),
        ({"rollout": {"switch_to_old_after": 3}}, "rollout.switch_to_old_after means nothing"),
        ({"rollout": {"sde": {"kind": "flow"}}}, "rollout.sde means nothing"),
        ({"rollout": {"engine": "http://127.0.0.1:1"}}, "rollout.engine means nothing"),
        ({"data": {"pick": "random"}}, "data.pick = 'random': there is no data.preferences"),
        ({"data": {"preference": "a"}}, "data.preference"),
    ],
)
def test_settings_without_a_meaning_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        recipe_of(Path("groups"), **changes)
