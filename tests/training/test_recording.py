"""dgpo collect: what a recipe's rollouts would sample first, scored, as a folder to train on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

import dgpo.cli.commands as cli
from dgpo.errors import UserError
from dgpo.models.pipeline.adapter import PipelineModel
from dgpo.models.policy import Policy
from dgpo.preferences import read_groups
from dgpo.prompts import PromptSampler, load_prompts
from dgpo.recipe import Recipe
from dgpo.rewards import load_rewards
from dgpo.rewards.shipped.stand_in import brightness, redness
from dgpo.training.collector import Collector, Sampled
from dgpo.training.recording import record
from families.tiny import sd3_small
from tiny_runs import PROMPTS, light, rows, settings

REWARDS = {"brightness": 1.0, "redness": -0.5}


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    file = tmp_path / "prompts.jsonl"
    lines = [f'{{"prompt": "{text}", "tag": {n}}}' for n, text in enumerate(PROMPTS)]
    file.write_text("\n".join(lines))
    return str(file)


def recipe_of(prompts: str, **changes: Any) -> Recipe:
    data = settings(rewards=REWARDS, prompts={"train": prompts}, seed=3, **changes)
    return Recipe.from_dict(data)


def sampled_online(recipe: Recipe, prompts: str, iteration: int) -> Sampled:
    """By a policy that has not moved, as the trainer does."""
    model = PipelineModel(sd3_small(), call=recipe.rollout.call)
    policy, rewards = Policy(model, recipe.lora), load_rewards(recipe.rewards)
    rows = PromptSampler(load_prompts(prompts), recipe.groups_per_iteration, recipe.seed)
    return Collector(recipe, policy, rewards, rows.at).sample(iteration)


def pixels(images: Any) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def test_it_holds_the_pictures_of_the_first_iterations(prompts: str, tmp_path: Path) -> None:
    recipe, said = recipe_of(prompts), []
    assert record(recipe, sd3_small(), tmp_path / "groups", 3, said.append) == 3
    assert [line.partition(",")[0] for line in said] == ["2 of 3 groups", "3 of 3 groups"]
    groups = read_groups(tmp_path / "groups", (16, 16))
    online = [sampled_online(recipe, prompts, iteration) for iteration in (0, 1)]
    images = [image for made in online for image in made.rollout.images or ()]
    for number, group in enumerate(groups):
        mine = images[4 * number : 4 * number + 4]
        assert np.array_equal(pixels(map(Image.open, group.images)), pixels(mine))
        bright, red = (reward(mine, [group.text] * 4) for reward in (brightness, redness))
        assert group.raters["brightness"] == pytest.approx(bright)
        assert group.raters["redness"] == pytest.approx(red)
        total = [b - 0.5 * r for b, r in zip(bright, red, strict=True)]
        assert group.rewards == pytest.approx(total, abs=1e-6)
        assert PROMPTS[group.metadata["tag"]] == group.text
    with pytest.raises(UserError, match="holds groups already"):
        record(recipe, sd3_small(), tmp_path / "groups", 3)


def test_the_command_writes_what_a_run_trains_on(
    prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    light(monkeypatch)
    data = settings(model="families.tiny:sd3_small", rewards=REWARDS, prompts={"train": prompts})
    data["algorithm"]["timesteps"] = {"count": 2, "indices": [0, 2]}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(data))
    recipe, folder = str(tmp_path / "tiny.yaml"), str(tmp_path / "groups")
    words = ["collect", recipe, "--out", folder, "--groups", "2", "--device", "cpu"]
    for step in (words, ["train", recipe, f"data.preferences={folder}", f"run.dir={tmp_path}/run"]):
        result = CliRunner().invoke(cli.app, step)
        assert result.exit_code == 0, (result.output, result.exception)
    assert [row["images"] for row in rows(tmp_path / "run")] == [0, 0]
    assert f"ranked groups of pictures in `{folder}`" in (tmp_path / "run/README.md").read_text()


def test_the_command_reads_the_vae_in_its_precision(
    prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Seen(Exception):
        pass

    def seen(recipe: Recipe, pipe: Any, *_: Any) -> None:
        assert pipe.vae.dtype == torch.float32 and pipe.transformer.dtype == torch.bfloat16
        raise Seen

    monkeypatch.setattr("dgpo.training.recording.record", seen)
    data = settings(model="families.tiny:sd3_small", rewards=REWARDS, prompts={"train": prompts})
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(data))
    words = ["collect", str(tmp_path / "tiny.yaml"), "--out", str(tmp_path), "--groups", "1"]
    words += ["--device", "cpu", "precision=bfloat16", "memory.vae_precision=float32"]
    result = CliRunner().invoke(cli.app, words)
    assert isinstance(result.exception, Seen), result.output


def test_rollouts_may_add_noise(prompts: str) -> None:
    """rollout.sde, for any algorithm: other pictures than the ODE's, and nothing recorded."""
    pictures, levels = [], []
    for sde in (None, {"kind": "flow", "noise_level": 0.0001}, {"kind": "flow"}):
        recipe = recipe_of(prompts, rollout={"sde": sde})
        model = PipelineModel(sd3_small(), call=recipe.rollout.call)
        policy = Policy(model, recipe.lora)
        rows, rewards = load_prompts(prompts)[:2], load_rewards(recipe.rewards)
        batch = Collector(recipe, policy, rewards, lambda _, rows=rows: rows)(0).batch
        assert batch is not None and not batch.steps
        pictures.append(batch.x0)
        levels.append([level.sigma for level in batch.levels])
    assert levels[0] == levels[1] == levels[2]
    plain, nearly, noisy = pictures
    assert float((plain - nearly).abs().max()) < 1e-2 < float((plain - noisy).abs().max())
    assert torch.isfinite(noisy).all()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rollout": {"sde": {"kind": "flow"}, "scheduler": "euler"}}, "instead of rollout.sched"),
        ({"rollout": {"sde": {"kind": "flow"}, "steps": 1}}, "rollout.steps = 1 leaves none"),
        ({"rollout": {"sde": {"kind": "brown"}}}, "rollout.sde"),
    ],
)
def test_noise_that_cannot_be_is_refused(prompts: str, changes: Any, said: str) -> None:
    timesteps = {"timesteps": {"count": 1, "indices": (0, 0)}}
    with pytest.raises(UserError, match=said):
        recipe_of(prompts, algorithm=timesteps, **changes)


def test_a_row_with_a_size_of_its_own_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "red dog", "width": 32}')
    with pytest.raises(UserError, match=r"width = 32.*rollout\.call\.width"):
        record(recipe_of(str(file)), sd3_small(), tmp_path / "groups", 1)
