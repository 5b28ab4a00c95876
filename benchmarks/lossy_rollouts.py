"""What do inexact rollouts (rollout.accelerate) cost, lose, and teach?  Two tables on the pocket.

python benchmarks/lossy_rollouts.py runs/lossy --iterations 12

The first: processor time and samples of a picture, distance and reward, of the untrained model, all
settings in turn within each round. The second: short runs, equal but for the setting.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from time import process_time
from typing import Any

import torch

from dgpo import Callback, Trainer
from dgpo.models.accelerate import Accelerated, distance
from dgpo.models.load import load_pipeline
from dgpo.models.pipeline.adapter import PipelineModel
from dgpo.models.policy import Policy
from dgpo.models.samplers.schedulers import make_scheduler
from dgpo.models.weights.compute import missing_compiler
from dgpo.prompts import Prompt, load_prompts
from dgpo.recipe import Recipe
from dgpo.recipe.sections import AccelerateSettings
from dgpo.rewards import load_rewards

RECIPE = "pocket-geneval"
SETTINGS: list[dict[str, Any]] = [
    {},
    {"steps": 7},
    {"steps": 5},
    {"steps": 3},
    {"cache": "fastercache"},
    {"cache": "taylorseer"},
    {"precision": "int8"},
    {"compile": True},
]
TRAINED = SETTINGS[:6]
GROUPS = 16


def name(setting: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}: {value}" for key, value in setting.items()) or "exact"


def pictures(rounds: int) -> None:
    """Print the first table."""
    recipe = Recipe.load(RECIPE)
    model = PipelineModel(load_pipeline(recipe.model), call=recipe.rollout.call)
    settings = [s for s in SETTINGS if "compile" not in s or not missing_compiler(model.denoisers)]
    policy = Policy(model, recipe.lora)
    samplers = [Accelerated(policy, AccelerateSettings(**s)) if s else policy for s in settings]
    prompts = load_prompts(str(recipe.prompts.eval))[:GROUPS]
    reward = load_rewards({"pocket_geneval_strict": 1.0})
    scheduler = make_scheduler(recipe.rollout.scheduler, model.pipe.scheduler)
    size, columns = recipe.group_size, range(len(settings))
    seconds, rewards = [0.0 for _ in columns], [[] for _ in columns]
    far: list[list[float]] = [[] for _ in columns]
    for sampler, setting in zip(samplers, settings, strict=True):  # warm-up, and compilation
        sample(sampler, model, recipe, prompts[0], setting.get("steps"), scheduler)
    for number in range(rounds):
        for prompt in prompts[number::rounds]:
            exact = None
            for column, (sampler, setting) in enumerate(zip(samplers, settings, strict=True)):
                began = process_time()
                made = sample(sampler, model, recipe, prompt, setting.get("steps"), scheduler)
                seconds[column] += process_time() - began
                exact = made.x0 if exact is None else exact
                far[column].append(distance(made.x0, exact))
                rewards[column] += reward(made.images, [prompt] * size).total.tolist()
    print("| rollouts | ms a picture | time | distance | largest | reward |")
    print("|---|---|---|---|---|---|")
    for column in columns:
        each = 1000 * seconds[column] / len(rewards[column])
        values = torch.tensor(rewards[column])
        error = 1.96 * float(values.std()) / len(values) ** 0.5
        print(
            f"| {name(settings[column])} | {each:.1f} | {seconds[column] / seconds[0]:.2f} | "
            f"{sum(far[column]) / len(far[column]):.3f} | {max(far[column]):.3f} | "
            f"{float(values.mean()):.3f} ± {error:.3f} |",
            flush=True,
        )


def sample(
    sampler: Any,
    model: PipelineModel,
    recipe: Recipe,
    prompt: Prompt,
    steps: int | None,
    scheduler: Any,
) -> Any:
    cond = model.encode([prompt.text] * recipe.group_size, guidance=True)
    with sampler.rolling():
        return model.rollout(
            cond,
            steps=steps or recipe.rollout.steps,
            guidance_scale=recipe.rollout.guidance_scale,
            scheduler=scheduler,
            generators=[torch.Generator().manual_seed(n) for n in range(cond.size)],
        )


class Clock(Callback):
    """Processor time of training, and each score beside it."""

    def __init__(self) -> None:
        self.seconds = self._began = 0.0
        self.rows: list[str] = []
        self.far = 0.0

    def on_iteration_begin(self, *args: Any, **what: Any) -> None:
        self._began = process_time()

    def on_iteration_end(self, state: Any, control: Any, *, row: Any, **what: Any) -> None:
        self.seconds += process_time() - self._began
        self.far = row.get("rollout_distance", self.far)

    def on_evaluate(self, state: Any, control: Any, *, report: Any, **what: Any) -> None:
        low, high = report.ci95
        forwards = f"{state.counted['forwards'] / 1000:.0f}k"
        self.rows.append(
            f"| {state.iteration} | {self.seconds:.0f} | {forwards} | "
            f"{report.overall:.3f} [{low:.3f}, {high:.3f}] | {self.far:.3f} |"
        )


def runs(folder: Path, iterations: int, every: int) -> None:
    """Print the second table."""
    print(
        "\n| rollouts | iteration | seconds | forwards | score | distance |"
        "\n|---|---|---|---|---|---|"
    )
    for setting in TRAINED:
        clock = Clock()
        changes = [
            f"run.dir={folder / name(setting).replace(': ', '-').replace(', ', '-')}",
            "run.loggers=[]",
            f"train.iterations={iterations}",
            "train.lr_schedule=constant",
            f"eval.every={every}",
            "eval.at_start=false",
            "eval.metrics=[pocket_geneval_strict]",
            "samples.count=0",
        ]
        changes += [f"rollout.accelerate.{key}={value}" for key, value in setting.items()]
        Trainer(recipe=Recipe.load(RECIPE, changes), callbacks=[clock]).train()
        for row in clock.rows:
            print(f"| {name(setting)} {row}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a new folder for the runs")
    parser.add_argument("--iterations", type=int, default=12, help="of each run; 0: no runs")
    parser.add_argument("--every", type=int, default=4, help="iterations between evaluations")
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(1)
    pictures(given.rounds)
    if given.iterations:
        runs(given.folder, given.iterations, given.every)


if __name__ == "__main__":
    main()
