"""Estimate what a run holds in memory, and what each phase needs on top at its worst moment."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dgpo.core.process import Level
from dgpo.distributed.sharding import pieces_of
from dgpo.errors import UserError
from dgpo.models.pipeline.adapter import PipelineModel
from dgpo.models.pipeline.probes import StandIn
from dgpo.models.pipeline.prompt_encoder import CACHE_BYTES, Conditioning
from dgpo.models.policy import Policy
from dgpo.models.weights.lora_names import DENOISERS
from dgpo.models.weights.memory import save_memory, text_encoders
from dgpo.planning.machine import Machine
from dgpo.planning.meta_memory import Unfilled, needs, without_numbers
from dgpo.planning.process import libraries
from dgpo.planning.skeleton import bytes_of, first_line
from dgpo.recipe import Recipe
from dgpo.registry import REWARDS

_STEPS = 4  # with fewer some pipelines have no step at all
_QUANTISED = {"bitsandbytes_4bit": 0.52, "bitsandbytes_8bit": 1.0, "torchao_int8": 1.0}
"""The bytes of a quantised weight, including its share of the scales."""


@dataclass(frozen=True)
class Flops:
    """The floating-point operations of one sample in one pass of the denoiser.

    Args:
        forward: without a gradient.
        backward: what the gradient of the trained weights costs beside it.
    """

    forward: int
    backward: int


@dataclass(frozen=True)
class Memory:
    """The memory of a run, in bytes.

    Args:
        parts: what is held from the start of training to its end, by part.
        phases: what each phase needs on top; only one phase runs at a time.
        notes: what could not be estimated, and why.
        kept: whether training cannot use the memory that other phases freed. This holds on the CPU:
            backward passes run in a thread of their own, and the C library's allocator serves each
            thread from its own arenas.
    """

    parts: Mapping[str, int]
    phases: Mapping[str, int]
    notes: Sequence[str] = ()
    kept: bool = False

    @property
    def peak(self) -> int:
        """The largest memory that the run holds, in bytes."""
        training = self.phases.get("training", 0)
        other = max((size for name, size in self.phases.items() if name != "training"), default=0)
        return sum(self.parts.values()) + (training + other if self.kept else max(training, other))


class Estimate:
    """Estimates the memory of a run from a policy on a pipeline without weights.

    Args:
        recipe: the run.
        pipe: the pipeline that :func:`dgpo.planning.skeleton.skeleton` returns.
        text: a prompt of the run.
        held_out: the number of prompts in an evaluation.
        machine: where the run is to be; the memory is that of one process.

    Attributes:
        flops: the operations of a pass, once :meth:`memory` has counted them; None where the
            denoiser cannot run without numbers.

    Raises:
        UserError: the run itself would refuse the recipe before it starts.
    """

    def __init__(
        self, recipe: Recipe, pipe: Any, text: str, held_out: int, machine: Machine
    ) -> None:
        self.recipe, self._pipe, self._machine = recipe, pipe, machine
        self._groups = math.ceil(recipe.groups_per_iteration / machine.gpus)
        self._held_out = math.ceil(held_out / machine.gpus)
        self._images = self._groups * recipe.group_size
        self._sampled: dict[tuple[int, bool], int] = {}
        self.flops: Flops | None = None
        self.model = PipelineModel(pipe, call=recipe.rollout.call)
        save_memory(pipe, self.model.denoisers, recipe.memory)
        networks = {n: m for n, m in pipe.components.items() if isinstance(m, nn.Module)}
        self._weights = {name: _weights(name, part, recipe) for name, part in networks.items()}
        train, self._pieces = recipe.train, 1
        if train.sharding == "fsdp2":
            self._pieces = pieces_of(machine.gpus, train.sharding_size)
            for name in self.model.denoisers:
                whole = 0 if train.reshard else self._weights[name]
                self._weights[name] = whole + self._weights[name] // self._pieces
        with Unfilled():
            self.policy = Policy(self.model, recipe.lora, recipe.seed)
        self.trained = _bytes(self.policy.parameters())
        self._notes: list[str] = []
        why = "activations are not counted: the prompt cannot be encoded without weights"
        self._cond = self._try(lambda: self.model.encode([text], guidance=True), None, why)

    @property
    def has_guidance(self) -> bool:
        """Return whether the pipeline has guidance; true where that cannot be seen."""
        cond = self._cond
        return cond is None or self._try(lambda: self.model.has_guidance(cond), True)

    def memory(self, prompts: int) -> Memory:
        """Return the estimate.

        Args:
            prompts: the number of distinct prompts, whose embeddings are kept.
        """
        recipe, trained = self.recipe, self.trained
        on_cpu = self._machine.device == "cpu"
        settings = recipe.memory
        away = settings.free_text_encoders or (settings.offload_text_encoders and not on_cpu)
        freed = text_encoders(self._pipe) if away else {}
        pieces = self._pieces if recipe.lora is None else 1  # a LoRA is whole in each process
        frozen = 0 if recipe.lora is not None else _bytes(self.policy.masters.weights)
        # FSDP2 leaves the gradients of all weights in each process until it sums them
        summed = pieces > 1 and recipe.train.sum_gradients == "micro_batch"
        parts = {
            "libraries": libraries() if on_cpu else 0,
            **{name: size for name, size in self._weights.items() if name not in freed},
            "LoRA": 0 if recipe.lora is None else trained,  # without one the denoiser counts it
            "masters": _bytes(self.policy.masters.copies) // pieces,
            "gradients": trained // pieces if summed else trained,
            "AdamW": 2 * trained // pieces,
            "averages": 0 if settings.snapshot_device else (2 * trained + frozen) // pieces,
            "prompts": self._prompts(prompts),
            "samples": self._samples(),
            "rewards": 0 if recipe.memory.offload_rewards else self._rewards(),
        }
        if recipe.train.sharding_offload and not on_cpu:
            parts |= dict.fromkeys((*self.model.denoisers, "masters", "AdamW", "averages"), 0)
            parts["gradients"] *= not summed
        phases = {
            "rollout": self._phase("rollout", self._rollout) if recipe.images_sampled else 0,
            "training": self._phase("training", self._training),
            "evaluation": self._phase("evaluation", self._evaluation) if self._held_out else 0,
            "encoding": sum(self._weights[name] for name in freed),
            "scoring": self._rewards() if recipe.memory.offload_rewards else 0,
        }
        return Memory(
            {name: size for name, size in parts.items() if size},
            {name: size for name, size in phases.items() if size},
            self._notes,
            kept=on_cpu,
        )

    def _try(self, run: Callable[[], Any], otherwise: Any, note: str = "") -> Any:
        """Run code without numbers. Where it needs numbers or files that are not there, note that
        and return something else."""
        try:
            with without_numbers():
                return run()
        except UserError:
            raise
        except Exception as error:  # pipelines and tokenizers may raise anything
            if note:
                self._notes.append(f"{note} ({type(error).__name__}: {first_line(error)})")
            return otherwise

    def _phase(self, name: str, run: Callable[[Conditioning], int]) -> int:
        cond, kind = self._cond, type(self._pipe).__name__
        note = f"activations of {name} are not counted: {kind} cannot run without numbers"
        return 0 if cond is None else self._try(lambda: run(cond), 0, note)

    def _rollout(self, cond: Conditioning) -> int:
        recipe = self.recipe
        rows = min(recipe.rollout.batch or self._images, self._images)
        return self._sampling(cond, rows, recipe.rollout.guidance_scale)

    def _evaluation(self, cond: Conditioning) -> int:
        own = self.recipe.eval_sampling
        return self._sampling(cond, min(own.batch, self._held_out), own.guidance_scale)

    def _sampling(self, one: Conditioning, rows: int, guidance: float) -> int:
        key = rows, guidance != 1
        if key not in self._sampled:
            self._sampled[key] = self._sample(_rows(one, rows), guidance)
        return self._sampled[key]

    def _sample(self, cond: Conditioning, guidance: float) -> int:
        with without_numbers():
            arguments = self.model.arguments(cond, guidance)
        scheduler = _passing(self._pipe.scheduler)

        @torch.no_grad()
        def call() -> Any:
            running = self.model.running(arguments, scheduler=scheduler)
            with self.policy.rolling("policy"), running as given:
                return self._pipe(
                    **given,
                    num_inference_steps=_STEPS,
                    output_type="pt",
                    return_dict=False,
                )

        return needs(call).memory

    def _training(self, cond: Conditioning) -> int:
        recipe = self.recipe
        trained = recipe.algorithm.trained_per_group or recipe.group_size
        whole = self._groups * trained
        rows = _rows(cond, min(recipe.rows_at_once(self._machine.device) or whole, whole))
        level, one = self._point
        xt = one.new_empty((rows.size, *one.shape[1:]))

        def call() -> None:
            made = self.policy.predict(xt, level, rows)
            made.float().square().mean().backward()

        for parameter in self.policy.parameters():  # of the passes before, which is a part
            parameter.grad = torch.empty_like(parameter)
        both = needs(call)
        for parameter in self.policy.parameters():
            parameter.grad = None
        with torch.no_grad():
            forward = needs(lambda: self.policy.predict(xt, level, rows)).flops
        self.flops = Flops(forward // rows.size, (both.flops - forward) // rows.size)
        return both.memory

    @functools.cached_property
    def _point(self) -> tuple[Level, Tensor]:
        """Return a noise level, and a sample of one row without numbers."""
        cond = self._cond
        assert cond is not None
        with torch.no_grad(), without_numbers():
            level = Level(torch.zeros((), device="meta"), 0.5)
            arguments = self.model.arguments(cond, 1.0)
            made = self.model.evaluate(None, level.timestep, arguments, rows=cond.size)
        return level, torch.empty_like(made)

    def _prompts(self, prompts: int) -> int:
        """Estimate the embeddings: all on the CPU, and on a GPU those of the pictures that are
        being made."""
        if self._cond is None:
            return 0
        one = sum(_size(value) for value in self._cond.call_kwargs(False).values())
        if self._machine.device == "cpu":
            return min(prompts * one, CACHE_BYTES)
        return one * max(self._groups, min(self.recipe.eval_sampling.batch, self._held_out))

    def _samples(self) -> int:
        """Estimate the clean samples and pictures of an iteration, in bytes."""
        x0 = None if self._cond is None else self._try(lambda: self._point[1], None)
        if x0 is None:
            return 0
        call = self.recipe.rollout.call
        height, width, frames = (call.get(name) for name in ("height", "width", "num_frames"))
        pixels = 3 * (height or 0) * (width or 0) * (frames or 1)
        return self._images * (_size(x0) + pixels)

    def _rewards(self) -> int:
        """Estimate the weights of rewards, in bytes; rewards share a model that two of them use."""
        names = {*self.recipe.rewards, *self.recipe.eval.metrics}
        on_gpu = self._machine.device == "cuda"
        sizes = {
            model: millions * 10**6 * (2 if entry.half and on_gpu else 4)
            for entry in (REWARDS[name] for name in names if name in REWARDS)
            for model, millions in entry.models.items()
        }
        return sum(sizes.values())


def _weights(name: str, module: nn.Module, recipe: Recipe) -> int:
    kind = recipe.memory.quantization
    if kind is None or name not in DENOISERS:
        return bytes_of(module)
    layers = [m.weight for m in module.modules() if isinstance(m, nn.Linear)]
    saved = sum(w.numel() * (w.element_size() - _QUANTISED[kind]) for w in layers)
    return int(bytes_of(module) - saved)


def _bytes(weights: Iterable[Tensor]) -> int:
    return sum(weight.numel() * weight.element_size() for weight in weights)


def _rows(cond: Conditioning, count: int) -> Conditioning:
    return cond.rows(torch.zeros(count, dtype=torch.long))


def _size(value: Any) -> int:
    parts = value if isinstance(value, list) else [value]
    return _bytes(p for p in parts if isinstance(p, Tensor))


class _Passing(StandIn):
    """A scheduler whose steps compute nothing: every step of a rollout needs the same memory."""

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, *_: Any, **how: Any) -> Any:
        made = torch.empty_like(sample)
        if how.get("return_dict", True):
            return type("Step", (), {"prev_sample": made, "pred_original_sample": made})()
        return (made,)


def _passing(scheduler: Any) -> Any:
    made = copy.copy(scheduler)
    made.__class__ = type("Passing", (_Passing, type(scheduler)), {})
    made.point = torch.zeros(1)
    made.num_inference_steps = _STEPS
    made.sigmas = torch.zeros(_STEPS + 1)
    return made
