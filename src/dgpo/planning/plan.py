"""Plan a recipe: say everything that can be said before a weight is loaded."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from dgpo.errors import UserError
from dgpo.evaluation import Metrics
from dgpo.models.pipeline.call_encoders import check_text_is_given_once
from dgpo.models.samplers.schedulers import make_scheduler
from dgpo.models.weights.lora import adapted_layers
from dgpo.models.weights.lora_names import DENOISERS
from dgpo.planning.counts import Counts, Samplers, count
from dgpo.planning.machine import GPUS, SHARE_OF_PEAK, Gpu, Machine
from dgpo.planning.memory import Estimate, Flops, Memory
from dgpo.planning.skeleton import parameters_in, skeleton
from dgpo.prompts import Prompt, load_prompts, refuse_sizes
from dgpo.recipe import Recipe
from dgpo.rewards import RewardSet, load_rewards
from dgpo.rewards.mixing import routed
from dgpo.training.agreement import refuse_unshardable
from dgpo.training.collector import rollout_scheduler
from dgpo.training.held_out import eval_sampler
from dgpo.training.offline import ranked_prompts

_SMALLER = {
    "training": "a smaller train.micro_batch",
    "rollout": "a smaller rollout.batch",
    "evaluation": "a smaller eval.batch",
}
"""What makes a phase smaller."""
_MUCH = 0.3
"""Evaluations that take a larger share of all passes are told of."""
_MEGA = 1e6


@dataclass(frozen=True)
class Plan:
    """What a run will cost.

    Args:
        recipe: the run.
        pipeline: the class of its pipeline.
        parameters: the number of parameters of every network, by its name.
        trained: the number of parameters that are trained.
        layers: the number of layers that a LoRA adapts; 0 without a LoRA.
        prompts: the number of training prompts and of held-out prompts.
        counts: the pictures and passes.
        memory: the bytes of one process, by part and phase.
        flops: the operations of a pass; None where they cannot be counted.
        machine: where the run is to be.
    """

    recipe: Recipe
    pipeline: str
    parameters: Mapping[str, int]
    trained: int
    layers: int
    prompts: tuple[int, int]
    counts: Counts
    memory: Memory
    flops: Flops | None
    machine: Machine

    def refuse_beyond(self, limit: int) -> None:
        """Refuse a plan that needs more memory than there is.

        Args:
            limit: the memory of one process, in bytes.

        Raises:
            UserError: names the largest part, and the settings that make the plan smaller.
        """
        if self.memory.peak <= limit:
            return
        every = {**self.memory.parts, **self.memory.phases}
        largest = max(every, key=lambda name: every[name])
        ways = "; ".join(self._ways_out()) or "a smaller model"
        raise UserError(
            f"the plan needs {self.memory.peak / 1e9:.1f} GB, and there are {limit / 1e9:.1f}: the "
            f"largest part is {largest} ({every[largest] / 1e9:.1f} GB). What makes it smaller: "
            f"{ways}"
        )

    def _ways_out(self) -> list[str]:
        """Return the settings that lower the peak, each with the most that it can save; the largest
        saving first."""
        recipe, parts, phases = self.recipe, self.memory.parts, self.memory.phases
        # what is taken from the largest phase shows down to the second largest
        *_, second, first = sorted([0, 0, *phases.values()])
        largest = max(phases, key=lambda name: phases[name], default="")
        ways = {_SMALLER[largest]: first - second} if largest in _SMALLER else {}
        if largest == "training" and not recipe.memory.gradient_checkpointing:
            ways["memory.gradient_checkpointing=true"] = first - second
        if not (recipe.memory.free_text_encoders or recipe.memory.offload_text_encoders):
            encoders = (size for name, size in parts.items() if name.startswith("text_encoder"))
            ways["memory.free_text_encoders=true"] = sum(encoders)
        if recipe.memory.quantization is None:
            ways["memory.quantization"] = sum(parts.get(name, 0) for name in DENOISERS)
        ways["memory.offload_rewards=true"] = parts.get("rewards", 0)
        ways["memory.snapshot_device=cpu"] = parts.get("averages", 0)
        ordered = sorted((way for way in ways if ways[way] > 0), key=lambda way: -ways[way])
        return [f"{way} (at most {ways[way] / 1e9:.1f} GB)" for way in ordered[:4]]

    def __str__(self) -> str:
        return "\n".join(
            [
                f"{self.recipe.model}: {self.pipeline}, {self.recipe.precision}",
                *self._about_parameters(),
                *self._about_counts(),
                *self._about_memory(),
                *self._about_time(),
            ]
        )

    def _about_parameters(self) -> list[str]:
        lora = self.recipe.lora
        what = f"a LoRA of rank {lora.rank} on {self.layers} layers" if lora else "the denoiser"
        rows = {**self.parameters, "trained": self.trained}
        lines = _table(rows, lambda n: f"{n:,}")
        return ["", "parameters", *lines[:-1], f"{lines[-1]}  {what}"]

    def _about_counts(self) -> list[str]:
        c, recipe = self.counts, self.recipe
        groups, size = recipe.groups_per_iteration, recipe.group_size
        run = c.iterations * c.forwards
        ranked = ", ranked before" * (recipe.data.preferences is not None)
        rows = {
            "images": f"{c.images:,}  {groups} groups of {size}{ranked}",
            "forward passes": f"{c.forwards:,}  {c.rollout:,} rollout, {c.training:,} training",
            "backward passes": f"{c.backward:,}",
            "an evaluation": f"{c.evaluation:,}  forward passes, {self.prompts[1]} prompts",
            "the whole run": f"{run + c.evaluations * c.evaluation:,}  forward passes: "
            f"{c.iterations} iterations, {c.evaluations} evaluations",
        }
        share = c.evaluations * c.evaluation / (run + c.evaluations * c.evaluation)
        if share > _MUCH:
            rows["evaluations"] = f"{share:.0%}  of all forward passes; eval.limit and eval.every "
            rows["evaluations"] += "make them fewer"
        return ["", "samples in an iteration", *_table(rows, str)]

    def _about_memory(self) -> list[str]:
        memory = self.memory
        rows = {
            **memory.parts,
            **{f"+ {name}": size for name, size in memory.phases.items()},
            "peak": memory.peak,
        }
        lines = _table(rows, lambda size: f"{size / _MEGA:,.1f}")
        notes = [f"  {note}" for note in memory.notes]
        where = "on a GPU" if self.machine.device == "cuda" else "on the CPU"
        what = f"memory {where} in MB; only one of the lines with a + at a time"
        return ["", what, *lines, *notes]

    def _about_time(self) -> list[str]:
        """Tell the seconds that GPUs need for the passes of the denoiser."""
        if self.flops is None or self.machine.device == "cpu":
            return []
        rows = {}
        for name, gpu in GPUS.items():
            rollout, training, evaluation = (size / self._pace(gpu) for size in self._work())
            fits = "" if self.memory.peak <= gpu.memory * 1e9 else "  does not fit"
            rows[name] = (
                f"{rollout + training:.3g}  {rollout:.3g} rollout, {training:.3g} training; an "
                f"evaluation {evaluation:.3g}{fits}"
            )
        number = "1 GPU" if self.machine.gpus == 1 else f"{self.machine.gpus} GPUs"
        what = (
            f"seconds of an iteration on {number}: the passes of the denoiser alone, at "
            f"{SHARE_OF_PEAK:.0%} of the peak, which is an assumption"
        )
        return ["", what, *_table(rows, str)]

    def _work(self) -> tuple[float, float, float]:
        """Return the operations of rollout, training and an evaluation."""
        c, flops = self.counts, self.flops
        assert flops is not None
        return (
            c.rollout * flops.forward,
            c.training * flops.forward + c.backward * flops.backward,
            c.evaluation * flops.forward,
        )

    def _pace(self, gpu: Gpu) -> float:
        peak = gpu.single if self.recipe.precision == "float32" else gpu.half
        return peak * 1e12 * SHARE_OF_PEAK * self.machine.gpus


def _table(rows: Mapping[str, Any], show: Any) -> list[str]:
    wide = max(map(len, rows))
    shown = {name: show(value).partition("  ") for name, value in rows.items()}
    right = max(len(number) for number, _, _ in shown.values())
    return [
        f"  {name:<{wide}}  {number:>{right}}{gap}{rest}".rstrip()
        for name, (number, gap, rest) in shown.items()
    ]


def make_plan(recipe: Recipe, machine: Machine | None = None) -> Plan:
    """Plan a run without loading a weight.

    Args:
        recipe: the run.
        machine: where the run is to be; None for this machine.

    Raises:
        UserError: the run would refuse the recipe before it starts, for a reason that can be seen
            without weights: files, names, LoRA targets, sizes, samplers or rewards.

    >>> plan = make_plan(Recipe.load("pocket-geneval"))
    >>> plan.pipeline, plan.counts.images, plan.prompts
    ('StableDiffusion3Pipeline', 128, (1152, 660))
    """
    machine = machine or Machine.here()
    rows, held_out = _prompts(recipe)
    pipe = skeleton(recipe.model, recipe.precision, recipe.memory.vae_precision)
    texts = [row.text for row in (*rows, *held_out)]
    refuse_unshardable(recipe, pipe, texts)
    parameters = {
        name: parameters_in(part)
        for name, part in pipe.components.items()
        if isinstance(part, nn.Module)
    }
    rollout, evaluation = _schedulers(recipe, pipe.scheduler)
    estimate = Estimate(recipe, pipe, texts[0], len(held_out), machine)
    samplers = Samplers(rollout, evaluation, _strength(recipe, pipe), estimate.has_guidance)
    for setting in ("free_text_encoders", "offload_text_encoders"):
        if getattr(recipe.memory, setting):
            check_text_is_given_once(pipe, setting)
    memory = estimate.memory(len(set(texts)))
    return Plan(
        recipe,
        type(pipe).__name__,
        parameters,
        sum(parameter.numel() for parameter in estimate.policy.parameters()),
        adapted_layers(estimate.model.denoisers),
        (len(rows), len(held_out)),
        count(recipe, samplers, len(held_out)),
        memory,
        estimate.flops,
        machine,
    )


def _prompts(recipe: Recipe) -> tuple[Sequence[Prompt], list[Prompt]]:
    """Load the training and the held-out prompts, and check them and the rewards."""
    offline = recipe.data.preferences is not None
    rewards = load_rewards(recipe.rewards) if recipe.rewards or not offline else RewardSet([])
    Metrics(recipe.eval.metrics or rewards)
    rows = ranked_prompts(recipe) if offline else load_prompts(recipe.prompts.train)
    held_out = [] if recipe.prompts.eval is None else load_prompts(recipe.prompts.eval)
    held_out = held_out[: recipe.eval.limit]
    trained = [] if offline else rows  # ranked groups are not sampled
    refuse_sizes([*trained, *held_out], recipe.rollout.call)
    routed(trained, rewards.weights)
    return rows, held_out


def _schedulers(recipe: Recipe, base: Any) -> tuple[Any, Any]:
    """Make the schedulers of rollouts, which may add noise, and of evaluations, which do not."""
    own = recipe.eval.scheduler
    return rollout_scheduler(recipe, base), (
        make_scheduler(recipe.rollout.scheduler, base) if own is None else eval_sampler(own, base)
    )


def _strength(recipe: Recipe, pipe: Any) -> float:
    """Return the share of the steps that is taken, by the recipe or by the pipeline's default."""
    known = inspect.signature(pipe.__call__).parameters.get("strength")
    if known is None:
        return 1.0
    value = recipe.rollout.call.get("strength", known.default)
    if not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise UserError(f"rollout.call.strength = {value!r:.80}: use a number from 0 to 1")
    return float(value)
