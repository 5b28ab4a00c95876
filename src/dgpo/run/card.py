"""The model card of a run, written from what the run has measured."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dgpo.recipe import Recipe
from dgpo.registry import MODELS
from dgpo.run.manifest import versions


def model_card(
    recipe: Recipe,
    rows: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Mapping[str, Any]],
    folder: Path,
) -> str:
    """Write the card as Markdown with the hub's front matter.

    Args:
        recipe: the run's settings.
        rows: the rows of ``metrics.jsonl``.
        evaluations: the rows of ``evaluations.jsonl``; iteration 0 is the base model.
        folder: the run folder; pictures that are not in it are not shown.
    """
    parts = [
        _front_matter(recipe, evaluations),
        f"# {Path(recipe.model).name} post-trained by {recipe.algorithm.name.upper()}\n",
        _lead(recipe, rows, evaluations),
        _scores(evaluations),
        _pictures(folder),
        _usage(recipe, folder),
        _training(recipe, rows, folder),
    ]
    return "\n".join(part for part in parts if part)


def _front_matter(recipe: Recipe, evaluations: Sequence[Mapping[str, Any]]) -> str:
    tags = ["text-to-image", "diffusers", "dgpo", "reinforcement-learning"]
    if recipe.lora is not None:
        tags.append("lora")
    matter: dict[str, Any] = {"library_name": "diffusers", "tags": tags}
    if recipe.model not in MODELS and not Path(recipe.model).exists():
        matter["base_model"] = recipe.model
    return f"---\n{yaml.safe_dump(matter, sort_keys=False)}---\n"


def _lead(
    recipe: Recipe, rows: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]
) -> str:
    kind = "Full fine-tuning" if recipe.lora is None else f"A LoRA of rank {recipe.lora.rank}"
    rewards = ", ".join(f"{name} (weight {w:g})" for name, w in recipe.reward_weights.items())
    goal = f"to raise {rewards or 'a custom reward'}"
    if recipe.data.preferences is not None:
        goal = f"on the ranked groups of pictures in `{recipe.data.preferences}`"
    text = f"{kind} for `{recipe.model}`, trained {goal}."
    if len(evaluations) > 1 and evaluations[0]["iteration"] == 0:
        first, last = evaluations[0], evaluations[-1]
        text += (
            f"\nOn {last['n']} held-out prompts the score went from "
            f"**{_with_interval(first['overall'])}** to **{_with_interval(last['overall'])}**"
        )
        text += f" in {last['seconds'] / 60:.1f} minutes of training." if rows else "."
    return text + "\n"


def _scores(evaluations: Sequence[Mapping[str, Any]]) -> str:
    if not evaluations:
        return "## Measured\n\nNothing was evaluated in this run.\n"
    last = evaluations[-1]
    shown = [last] if len(evaluations) == 1 else [evaluations[0], last]
    heads = [_when(evaluation) for evaluation in shown]
    lines = [
        "## Measured\n",
        f"The averaged weights on {last['n']} held-out prompts, with 95% intervals in brackets.\n",
        "| | " + " | ".join(heads) + " |",
        "|---|" + "---|" * len(heads),
    ]
    lines.append(_row("**overall**", [_with_interval(e["overall"], e["ci95"]) for e in shown]))
    for key in ("categories", "rewards"):
        for name in last.get(key) or {}:
            values = [(e.get(key) or {}).get(name) for e in shown]
            bounds = [(e.get("intervals") or {}).get(name) for e in shown]
            label = name if key == "categories" else f"metric `{name}`"
            lines.append(_row(label, list(map(_with_interval, values, bounds))))
    return "\n".join(lines) + "\n"


def _when(evaluation: Mapping[str, Any]) -> str:
    iteration = evaluation["iteration"]
    return "base model" if iteration == 0 else f"after {iteration} iterations"


def _row(label: str, cells: Sequence[str]) -> str:
    return f"| {label} | " + " | ".join(cells) + " |"


def _with_interval(value: float | None, bounds: Sequence[float] | None = None) -> str:
    if value is None:
        return "not measured"
    text = f"{value:.3f}"
    if bounds and None not in bounds:
        text += f" [{bounds[0]:.3f}, {bounds[1]:.3f}]"
    return text


def _pictures(folder: Path) -> str:
    wanted = {
        "curve.png": "Reward and held-out score over the run",
        "samples/before_after.png": "The same prompts and seeds before and after",
    }
    shown = [f"![{text}]({file})\n" for file, text in wanted.items() if (folder / file).exists()]
    return "\n".join(shown)


def _usage(recipe: Recipe, folder: Path) -> str:
    load = f'pipe = DiffusionPipeline.from_pretrained("{recipe.model}")'
    imports = "from diffusers import DiffusionPipeline"
    if recipe.model in MODELS:
        module, _, function = MODELS[recipe.model].path.partition(":")
        load, imports = f"pipe = {function}()", f"from {module} import {function}"
    if recipe.lora is not None:
        lines = [imports, "", load, f'pipe.load_lora_weights("{folder.name}/lora")']
    else:
        saved = sorted(p.name for p in (folder / "model").glob("*") if p.is_dir())
        lines = [imports, "", load]
        for part in saved or ["transformer"]:
            read = f'type(pipe.{part}).from_pretrained("{folder.name}/model/{part}")'
            lines.append(f"pipe.{part} = {read}")
    how = recipe.eval_sampling
    call = {"num_inference_steps": how.steps, "guidance_scale": how.guidance_scale}
    call |= recipe.rollout.call
    arguments = ", ".join(f"{key}={value!r}" for key, value in call.items())
    lines.append(f'pipe("a prompt", {arguments}).images[0]')
    return "## Use\n\n```python\n" + "\n".join(lines) + "\n```\n"


def _training(recipe: Recipe, rows: Sequence[Mapping[str, Any]], folder: Path) -> str:
    images = len(rows) * recipe.images_per_iteration
    lines = ["## Training\n"]
    if rows:
        minutes = (rows[-1]["seconds"] or 0) / 60
        lines.append(
            f"{len(rows)} iterations of {recipe.groups_per_iteration} groups of "
            f"{recipe.group_size} images ({images} in all), {minutes:.1f} minutes of training, "
            f"learning rate {recipe.train.lr:g}, seed {recipe.seed}. All settings are in "
            "`recipe.yaml`, every iteration in `metrics.jsonl`, every evaluation in "
            "`evaluations.jsonl`.\n"
        )
    lines.append("Repeat it with:\n")
    lines.append(f"```\ndgpo train {folder.name}/recipe.yaml run.dir=ANOTHER_FOLDER\n```\n")
    settings = recipe.to_dict()["algorithm"]
    lines.append("The algorithm's settings:\n")
    lines.append(f"```yaml\n{yaml.safe_dump(settings, sort_keys=False)}```\n")
    found = versions()
    packages = ", ".join(
        f"{name} {found[name] or '(not installed as a package)'}"
        for name in ("dgpo", "torch", "diffusers", "peft")
    )
    lines.append(f"Made with {packages}, Python {platform.python_version()}.\n")
    return "\n".join(lines)
