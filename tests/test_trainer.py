"""Runs of the tiny SD3: that they learn, repeat themselves, refuse nonsense and can be read."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from safetensors.torch import load_file
from torch import Tensor

import dgpo.models.policy
import dgpo.models.weights.snapshots
import dgpo.trainer
import dgpo.training.setup
from dgpo import Callback
from dgpo.algorithms import DGPO, FlowGRPO
from dgpo.core.groups import Groups
from dgpo.errors import UserError
from dgpo.evaluation import sample_images
from dgpo.models.pipeline.adapter import PipelineModel
from dgpo.planning.counts import Samplers, count
from dgpo.recipe import Recipe
from dgpo.rewards import load_rewards
from dgpo.rewards.shipped.stand_in import brightness, redness
from families.tiny import sd3_small
from tiny_runs import PROMPTS, TIMESTEPS, Calls, Spy, light, rows, settings, trainer, without_times


@pytest.fixture(autouse=True)
def _light(monkeypatch: pytest.MonkeyPatch) -> None:
    light(monkeypatch)


def test_the_reward_rises(tmp_path: Path) -> None:
    levels = {"count": 1, "indices": [0, 1]}
    settings: dict[str, Any] = {
        "algorithm": {"beta": 1.0, "kl": 0.0, "clip": None, "timesteps": levels},
        "group_size": 8,
        "train": {"iterations": 12, "lr": 1e-2},
        "lora": None,
    }
    run = trainer(tmp_path, redness, **settings)
    run.train()
    found = rows(tmp_path)
    first, last = (np.mean([r["reward_mean"] for r in part]) for part in (found[:2], found[-2:]))
    spread = found[0]["spread"]
    assert last > first + 8 * spread, (first, last, spread)


def test_two_runs_of_a_recipe_are_equal(tmp_path: Path) -> None:
    for name in ("a", "b"):
        run = trainer(tmp_path / name, eval_dataset=PROMPTS[:2], eval={"at_start": True})
        torch.manual_seed(len(name) if name == "a" else 99)  # the global state is nobody's business
        np.random.seed(3)
        run.train()
    one, two = (without_times(tmp_path / name) for name in ("a", "b"))
    assert one == two and len(one) == 2
    evaluations = [without_times(tmp_path / name, "evaluations.jsonl") for name in ("a", "b")]
    assert evaluations[0] == evaluations[1] and len(evaluations[0]) == 2
    other = trainer(tmp_path / "c", seed=1, train={"iterations": 1})
    other.train()
    assert without_times(tmp_path / "c")[0] != one[0]


def test_a_row_says_what_happened(tmp_path: Path) -> None:
    def by_prompt(images: Any, prompts: list[str]) -> list[float]:
        values = brightness(images, prompts)
        return [0.5 if p == PROMPTS[0] else v for p, v in zip(prompts, values, strict=True)]

    run = trainer(
        tmp_path,
        by_prompt,
        train_dataset=PROMPTS[:2],
        train={"iterations": 1},
        algorithm=Spy(timesteps=TIMESTEPS, equal_groups="skip"),
    )
    with Calls(run.model.denoisers["transformer"]) as calls:
        run.train()
    (row,) = rows(tmp_path)
    assert {"iteration", "reward_mean", "loss", "seconds"} <= set(row)
    assert row["iteration"] == 1 and row["groups_dropped"] == 1
    assert row["reward/by_prompt"] == row["reward_mean"]
    # 3 steps for the trial's 2 pictures and the 8 pictures; 2 levels of 1 group for 3 models
    assert calls.sizes == [2] * 3 + [8] * 3 + [4] * 6
    timed = [row[f"seconds_{part}"] for part in ("rollout", "reward", "train")]
    assert sum(timed) == pytest.approx(row["seconds_iteration"], abs=0.05)


def test_what_is_given_beside_a_recipe_is_written_into_it(tmp_path: Path) -> None:
    class Local(DGPO):
        """Of a class that no path leads to."""

    data = settings(run={"dir": str(tmp_path)}, model="pocket", rewards={"redness": 1.0})
    recipe = Recipe.from_dict({**data, "algorithm": Local(beta=7.0, timesteps=TIMESTEPS)})
    run = dgpo.trainer.Trainer(
        model=sd3_small(), reward_funcs=[brightness], train_dataset=PROMPTS, recipe=recipe
    )
    assert run.recipe.model == "StableDiffusion3Pipeline" and run.recipe.precision == "float32"
    assert run.recipe.rewards == {"dgpo.rewards.shipped.stand_in:brightness": 1.0}
    assert run.recipe.prompts.train is None and run.rewards.names == ["brightness"]
    assert isinstance(run.algorithm, Local) and run.algorithm.beta == 7.0
    assert yaml.safe_load(run.recipe.to_yaml())["algorithm"]["beta"] == 7.0
    for rewards in ("redness", ["redness"], {"redness": 1.0}):
        assert trainer(tmp_path, rewards).recipe.rewards == {"redness": 1.0}
    assert trainer(tmp_path, {redness: 2.0}).rewards.weights == {"redness": 2.0}


def check_alone(run: dgpo.trainer.Trainer) -> None:
    """Trap 7: one process needs no process group."""
    run.train()
    assert not torch.distributed.is_initialized()


def test_nothing_is_asked_of_torch_distributed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a process group is needed")

    for name in ("all_reduce", "all_gather", "broadcast", "barrier", "get_rank", "get_world_size"):
        monkeypatch.setattr(torch.distributed, name, absent)
    short = {"iterations": 1}
    check_alone(trainer(tmp_path / "a", train=short))
    right = Groups.sum

    def reduced(self: Groups, x: Tensor) -> Tensor:
        total = right(self, x)
        torch.distributed.all_reduce(total)
        return total

    monkeypatch.setattr(Groups, "sum", reduced)
    with pytest.raises(AssertionError, match="process group"):
        check_alone(trainer(tmp_path / "b", train=short))


def check_restored(run: dgpo.trainer.Trainer) -> None:
    """Trap 8: weights that were swapped in for an evaluation are gone after it."""
    generator = torch.Generator().manual_seed(0)
    for parameter in run.policy.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    denoiser = run.model.denoisers["transformer"]
    before = {name: p.detach().clone() for name, p in denoiser.named_parameters()}
    for weights in ("slow", "old", "policy"):
        run.evaluate(weights)
    for name, parameter in denoiser.named_parameters():
        assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("lora", [{"rank": 2}, None], ids=["lora", "full"])
def test_an_evaluation_leaves_the_weights_alone(
    lora: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_restored(trainer(tmp_path, lora=lora, eval_dataset=PROMPTS[:2]))
    forgetful = dgpo.models.weights.snapshots.exchanged

    def left_in(parameters: Any, values: Any) -> Any:
        place = forgetful(parameters, values)
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data = value
        return place

    monkeypatch.setattr(dgpo.models.weights.snapshots, "exchanged", left_in)
    monkeypatch.setattr(dgpo.models.policy, "exchanged", left_in)
    with pytest.raises(AssertionError):
        check_restored(trainer(tmp_path, lora=lora, eval_dataset=PROMPTS[:2]))


def test_a_run_too_short_for_its_average_says_so_at_its_start(tmp_path: Path) -> None:
    for every in (1, 2, 3):
        trainer(tmp_path / str(every), train={"iterations": 2}, ema={"every": every}).train()
    assert not (tmp_path / "1" / "warnings.jsonl").exists()
    for every, share in ((2, "18%"), (3, "100%")):
        (row,) = rows(tmp_path / str(every), "warnings.jsonl")
        assert row["iteration"] == 0
        assert row["warning"].startswith(f"after 2 iterations {share} of the average, which is")


def test_a_run_that_ends_too_early_for_its_average_says_so_then(tmp_path: Path) -> None:
    class Enough(Callback):
        def on_iteration_end(self, state: Any, control: Any, **what: Any) -> None:
            control.should_stop = True

    trainer(tmp_path, train={"iterations": 20}, ema={"every": 2}, callbacks=[Enough()]).train()
    (row,) = rows(tmp_path, "warnings.jsonl")
    assert row["iteration"] == 1
    assert row["warning"].startswith("after 1 iterations 100% of the average")


@pytest.mark.parametrize(("every", "found"), [(0, [1, 3, 5]), (2, [1, 2, 3, 4, 5])])
def test_further_iterations_may_be_evaluated(every: int, found: list[int], tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "eval": {"every": every, "at": [1, 3, 9]},
        "train": {"iterations": 5},
    }
    run = trainer(tmp_path, eval_dataset=PROMPTS[:1], **changes)
    run.train()
    evaluated = [row["iteration"] for row in rows(tmp_path, "evaluations.jsonl")]
    assert evaluated == found
    counts = count(run.recipe, Samplers(run.scheduler, run.scheduler, 1.0, True), held_out=1)
    assert counts.evaluations == len(found)


def test_evaluations_may_have_a_sampler_of_their_own(tmp_path: Path) -> None:
    run = trainer(tmp_path, eval_dataset=PROMPTS[:2], eval={"scheduler": "dpmsolver++"})
    assert type(run._held_out.sampling.scheduler) is DPMSolverMultistepScheduler
    assert type(run.scheduler) is FlowMatchEulerDiscreteScheduler
    again = trainer(tmp_path / "again", eval_dataset=PROMPTS[:2], rollout={"scheduler": "heun"})
    assert type(again._held_out.sampling.scheduler) is FlowMatchHeunDiscreteScheduler
    with pytest.raises(UserError, match=r"eval\.scheduler: there is no sampler 'dpm'"):
        trainer(tmp_path / "bad", eval_dataset=PROMPTS[:2], eval={"scheduler": "dpm"})


def test_the_slow_average_is_what_is_evaluated(tmp_path: Path) -> None:
    run = trainer(tmp_path, eval_dataset=PROMPTS[:2])
    base = run.evaluate("slow")
    for parameter in run.policy.parameters():
        parameter.data += 0.3
    assert run.evaluate() == base != run.evaluate("policy")
    run.policy.slow.update(0.0)
    assert run.evaluate() == run.evaluate("policy")


def test_a_policy_gradient_has_no_old_policy_to_evaluate(tmp_path: Path) -> None:
    run = trainer(tmp_path, algorithm=FlowGRPO(updates=1), eval_dataset=PROMPTS[:2])
    with pytest.raises(UserError, match=r"evaluate\('old'\): flow_grpo keeps no old policy"):
        run.evaluate("old")


def test_the_model_can_be_saved_anywhere(tmp_path: Path) -> None:
    run = trainer(tmp_path / "run", lora={"rank": 4, "alpha": 12})
    run.train()
    run.save_model(tmp_path / "mine")
    ours, mine = tmp_path / "run/lora", tmp_path / "mine"
    assert {file.name for file in ours.iterdir()} == {file.name for file in mine.iterdir()}
    saved, again = (load_file(d / "pytorch_lora_weights.safetensors") for d in (ours, mine))
    assert saved.keys() == again.keys() and len(saved) > 0
    assert all(torch.equal(saved[name], tensor) for name, tensor in again.items())


def test_the_saved_lora_draws_the_same_pictures(tmp_path: Path) -> None:
    far: dict[str, Any] = {"warmup": None}  # from the policy
    run = trainer(tmp_path, eval_dataset=PROMPTS[:2], lora={"rank": 4, "alpha": 12}, ema=far)
    run.train()
    with run.policy.rolling("slow"):
        wanted = sample_images(run.model, run.eval_prompts, run._held_out.sampling)
    with run.policy.rolling("policy"):
        policy = sample_images(run.model, run.eval_prompts, run._held_out.sampling)
    pipe = sd3_small()
    pipe.load_lora_weights(tmp_path / "lora")
    model = PipelineModel(pipe, call=run.recipe.rollout.call)
    found = sample_images(model, run.eval_prompts, run._held_out.sampling)
    base = sample_images(
        PipelineModel(sd3_small(), call=model.call), run.eval_prompts, run._held_out.sampling
    )

    def distance(a: Any, b: Any) -> int:
        return max(int(np.abs(np.int16(x) - np.int16(y)).max()) for x, y in zip(a, b, strict=True))

    assert distance(found, wanted) <= 1  # merged and not merged round differently
    assert distance(base, wanted) > 3 and distance(policy, wanted) > 1


def test_a_folder_in_use_is_refused_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*args: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(dgpo.training.setup, "load_pipeline", load)
    with pytest.raises(UserError, match="holds no checkpoint"):
        trainer(tmp_path, model="pocket", resume=True)
    with pytest.raises(UserError, match="prompts: it is empty"):
        trainer(tmp_path, model="pocket", train_dataset=[])
    (tmp_path / "recipe.yaml").write_text("")
    with pytest.raises(UserError, match=r"already holds a run.*--resume"):
        trainer(tmp_path, model="pocket")


BAD = {
    "nan": (lambda images, prompts: [0.0, float("nan")], "reward 'bad', row 1.*got nan"),
    "count": (lambda images, prompts: [0.0], "reward 'bad' returned 1 numbers for 2 images"),
    "text": (lambda images, prompts: ["a"] * len(images), "reward 'bad', row 0.*not a number"),
    "none": (lambda images, prompts: None, "reward 'bad' returned None"),
}


def test_a_bad_reward_is_named_before_the_run_begins(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    for answer, message in BAD.values():

        def bad(images: Any, prompts: Any, answer: Any = answer) -> Any:
            return answer(images, prompts)

        run.data = replace(run.data, rewards=load_rewards([bad]))
        with pytest.raises(UserError, match=message):
            run.train()
        assert not (tmp_path / "recipe.yaml").exists()  # so that the next try is not refused


def test_a_reward_that_turns_bad_is_named(tmp_path: Path) -> None:
    calls = itertools.count()

    def tired(images: Any, prompts: Any) -> list[float]:
        return [float("inf") if next(calls) >= 10 else 1.0 for _ in images]

    with pytest.raises(UserError, match=r"reward 'tired', row 0.*got inf"):
        trainer(tmp_path, tired).train()
    assert len(rows(tmp_path)) == 1
    assert rows(tmp_path)[0]["groups_dropped"] == 2 and rows(tmp_path)[0]["loss"] == 0


def test_metrics_may_refuse_prompts_before_the_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="quot"):
        trainer(tmp_path, "ocr", train_dataset=["no text at all"])
    with pytest.raises(UserError, match="quot"):
        trainer(tmp_path, eval_dataset=["no text at all"], eval={"metrics": ["ocr"]})


def test_ctrl_c_saves_and_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = itertools.count()

    def interrupted(images: Any, prompts: Any) -> list[float]:
        if next(calls) == 2:  # 0 is the trial
            raise KeyboardInterrupt
        return brightness(images, prompts)

    run = trainer(tmp_path, interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    said = " ".join(capsys.readouterr().err.split())
    assert "stopped; 1 iterations are saved" in said
    assert f"dgpo train {tmp_path / 'recipe.yaml'} --resume" in said
    assert (tmp_path / "checkpoints/00000001/state.json").exists() and any(tmp_path.glob("lora/*"))
    run.train()  # the same object goes on as well
    assert [row["iteration"] for row in rows(tmp_path)] == [1, 2]


def test_training_time_ends_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(step=10)
    monkeypatch.setattr(dgpo.trainer, "monotonic", lambda: float(next(clock)))
    run = trainer(tmp_path, train={"iterations": 9, "max_minutes": 0.5})
    run.train()
    assert [row["seconds"] for row in rows(tmp_path)] == [20.0, 40.0]
    assert (tmp_path / "lora").is_dir() and (tmp_path / "README.md").exists()


def test_rollouts_switch_to_the_old_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    right = dgpo.models.policy.Policy.rolling

    def rolling(self: Any, weights: Any = "policy") -> Any:
        used.append(weights)
        return right(self, weights)

    monkeypatch.setattr(dgpo.models.policy.Policy, "rolling", rolling)
    run = trainer(tmp_path, rollout={"switch_to_old_after": 1, "batch": 3}, train={"iterations": 2})
    run.train()
    assert used == ["policy", "old"]
