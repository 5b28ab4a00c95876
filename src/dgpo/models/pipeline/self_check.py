"""The self-check: is what will be trained, bit for bit, what samples?

A wrong timestep scale, a dropped mask or a flipped sign does not crash. It trains towards nothing
and is found days later, so every run starts with this check.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dgpo.core.process import Level
from dgpo.errors import UserError, told
from dgpo.models.pipeline.probes import Step
from dgpo.models.pipeline.prompt_encoder import Conditioning
from dgpo.models.samplers import schedulers
from dgpo.models.samplers.sde_schedulers import SdeScheduler, with_noise
from dgpo.models.weights.compute import is_compiled

if TYPE_CHECKING:
    from dgpo.models.pipeline.adapter import PipelineModel

CHECK_PROMPTS = ("a photo of a red square", "a cat")
_STEPS = 3
_GUIDANCE = 3.0


@dataclass(frozen=True)
class CheckedPoint:
    """A ``CheckedPoint`` was evaluated again; a difference of 0 means equal, bit for bit."""

    sampler: str
    guidance_scale: float
    level: Level
    difference: float


@dataclass(frozen=True)
class CheckReport:
    """A ``CheckReport`` holds what the self-check found.

    Args:
        pipeline: the class of the pipeline.
        process: the noising process, e.g. ``FlowMatching``.
        points: every point of the rollouts.
        step_error: the distance of a sampler's first-order step from the same step written with the
            process, relative to the size of the sample; the largest of all samplers.
    """

    pipeline: str
    process: str
    points: tuple[CheckedPoint, ...]
    step_error: float

    @property
    def ok(self) -> bool:
        """Return whether every point is bitwise equal."""
        return all(point.difference == 0.0 for point in self.points)

    def __str__(self) -> str:
        lines = [f"{self.pipeline} ({self.process}), step error {self.step_error:.1e}"]
        for point in self.points:
            verdict = "equal" if point.difference == 0.0 else f"differs by {point.difference:.2e}"
            lines.append(
                f"  {point.sampler}, guidance {point.guidance_scale:g}, "
                f"t={float(point.level.timestep):g}, sigma={point.level.sigma:.4f}: {verdict}"
            )
        return "\n".join(lines)


def self_check(
    model: PipelineModel,
    cond: Conditioning | None = None,
    samplers: Sequence[Any] = (),
    guidance_scale: float = 1.0,
    steps: int = _STEPS,
) -> CheckReport:
    """Run short rollouts, evaluate the denoiser again at their points, and compare.

    The values must be equal bit by bit, with guidance off and, where the pipeline has it, on.
    Gradients must reach the input. The noise levels must be those of the training schedule. One
    step of a first-order sampler, and the first step of every sampler that begins with such a step,
    must be the step that the noising process describes, which fixes sign, scale and direction of
    the model's output.

    >>> from dgpo.models import PipelineModel, load_pipeline
    >>> report = self_check(PipelineModel(load_pipeline("pocket")))
    >>> report.ok, len(report.points), report.step_error < 1e-3
    (True, 6, True)

    Args:
        model: what will be trained.
        cond: conditioning to check with (with a negative prompt); None to encode two prompts.
        samplers: those of the run, with and without noise. With none the pipeline's own is used, or
            a first-order sampler if that one has noise.
        guidance_scale: the run's scale. If it is 1, guidance is checked at another scale.
        steps: the number of steps of the run. With guidance one row is checked at all of them,
            because guidance may depend on a step's number.

    Raises:
        UserError: training would not train what samples, and the message holds the report; or the
            pipeline raised another error, which is its cause.
    """
    try:
        cond = model.encode(list(CHECK_PROMPTS), guidance=True) if cond is None else cond
        samplers = samplers or [_own_or_first_order(model.pipe.scheduler)]
        return _Check(model, cond).report(samplers, guidance_scale, steps)
    except UserError:
        raise
    except Exception as error:  # a pipeline that nobody has tried may raise anything
        for kind in map(type, samplers):
            if kind.__module__.partition(".")[0] not in ("diffusers", "dgpo"):
                raise UserError(
                    f"sampler {kind.__name__} failed when it was tried out: {told(error)}; its "
                    "set_timesteps and step must do what those of a scheduler of diffusers do"
                ) from error
        said = str(error).partition("\n")[0][:300]
        calls = ", ".join(f"rollout.call.{key}" for key in model.call)
        advice = f", or to leave out one of {calls}" if calls else ""
        raise UserError(
            f"model: {type(model.pipe).__name__} failed when it was tried out "
            f"({type(error).__name__}: {said}); try another rollout.scheduler, "
            f"rollout.guidance_scale=1{advice}; dgpo check MODEL shows what works and what does not"
        ) from error


def is_narrow(model: PipelineModel) -> bool:
    """Return whether the denoiser computes in half precision, though its samples may be wider."""
    return any(p.dtype.itemsize < 4 for d in model.denoisers.values() for p in d.parameters())


def _own_or_first_order(base: Any) -> Any:
    try:
        return schedulers.make_scheduler(None, base)
    except UserError:
        return schedulers.first_order_sampler(base)


@dataclass(frozen=True)
class _Check:
    """A ``_Check`` examines one model with one conditioning."""

    model: PipelineModel
    cond: Conditioning

    @property
    def name(self) -> str:
        return type(self.model.pipe).__name__

    def report(self, samplers: Sequence[Any], scale: float, count: int) -> CheckReport:
        """Check all points of short rollouts; with guidance also all steps of a whole one."""
        on = scale if scale != 1 else _GUIDANCE
        scales = [1.0, on] if self.model.has_guidance(self.cond) else [1.0]
        points: list[CheckedPoint] = []
        if is_compiled(self.model.denoisers):
            # the second size of a batch is compiled for all sizes, and the first then runs by that
            for other in scales:
                self.steps(samplers[0], other)
        for sampler in samplers:
            made = {other: self.steps(sampler, other) for other in scales}
            self.check_levels(sampler, made[1.0])
            for other, steps in made.items():
                _refuse_not_finite(sampler, steps)
                points += [self.point(sampler, other, step) for step in steps]
                self.check_gradient(other, steps[0])
            if scale in made:
                self.check_guidance(scale, made[1.0], made[scale])
        # a short rollout may not reach the steps at which guidance changes
        if scale != 1 and len(scales) > 1 and count > _STEPS:
            one_row = _Check(self.model, self.cond.rows(torch.tensor([0])))
            one_row.check_every_step(samplers[0], scale, count)
        error = max(self.step_errors(samplers))
        found = CheckReport(self.name, type(self.model.process).__name__, tuple(points), error)
        if not found.ok:
            raise UserError(f"model: evaluating the pipeline does not repeat its rollout\n{found}")
        # in half precision every step rounds the sample itself
        if not found.step_error <= (5e-2 if is_narrow(self.model) else 1e-3):
            raise UserError(
                "model: the scheduler does not integrate what would be trained (another sign, "
                f"scale or direction of the output)\n{found}"
            )
        return found

    def steps(self, sampler: Any, scale: float = 1.0, count: int = _STEPS) -> list[Step]:
        """Return the steps of a rollout; all but the last have noise if the sampler adds any."""
        rows = range(self.cond.size)
        if isinstance(sampler, SdeScheduler):
            sampler = with_noise(sampler, range(count - 1), rows)
        return self.model.rollout(
            self.cond,
            steps=count,
            guidance_scale=scale,
            scheduler=sampler,
            generators=[torch.Generator().manual_seed(row) for row in rows],
            decode=False,
            record=True,
        ).steps

    @torch.no_grad()
    def point(self, sampler: Any, scale: float, step: Step) -> CheckedPoint:
        """Evaluate a step again, without gradients as in the rollout: with them torch may choose
        another kernel."""
        again, difference = self.model.predict(step.sample, step.level, self.cond, scale), 0.0
        # NaN is unequal to itself, so a model that answers NaN does not pass
        if not torch.equal(again, step.output):
            alike = again.shape == step.output.shape
            far = float((again.float() - step.output.float()).abs().max()) if alike else math.inf
            difference = far if far > 0.0 else math.inf
        return CheckedPoint(type(sampler).__name__, scale, step.level, difference)

    def check_levels(self, sampler: Any, steps: Sequence[Step]) -> None:
        """Refuse a sampler that names another noise level than its timestep has in training."""
        alphas_cumprod = getattr(self.model.process, "alphas_cumprod", None)
        if alphas_cumprod is None or not len(alphas_cumprod):
            return
        for level in (step.level for step in steps):
            time = float(level.timestep)
            low, high = schedulers.sigmas_around(alphas_cumprod, time)
            if not low - 1e-4 <= level.sigma <= high + 1e-4:
                raise UserError(
                    f"rollout.scheduler: {type(sampler).__name__} counts timestep {time:g} as "
                    f"noise level {level.sigma:.4f}, which is {low:.4f} to {high:.4f} in the "
                    "pipeline's training schedule: a wrong level would be trained; use another, "
                    "such as 'ddim'"
                )

    def check_every_step(self, sampler: Any, scale: float, count: int) -> None:
        """Refuse guidance that depends on a step's number."""
        checked = [
            (s.index, self.point(sampler, scale, s)) for s in self.steps(sampler, scale, count)
        ]
        differ = [str(index) for index, point in checked if point.difference]
        if differ:
            call = self.model.call
            calls = f" or leave out one of {', '.join(call)} (rollout.call)" if call else ""
            raise UserError(
                f"rollout.guidance_scale: the guidance of {self.name} depends on a step's number "
                f"(step {', '.join(differ)} of {count}, counted from 0), so that no single step "
                f"can be trained with it; use 1,{calls}"
            )

    def check_gradient(self, scale: float, step: Step) -> None:
        """Refuse a pipeline whose gradients do not reach its input, or are not finite."""
        with torch.enable_grad():
            xt = step.sample.clone().requires_grad_(True)
            output = self.model.predict(xt, step.level, self.cond, scale)
            if not output.requires_grad:
                raise UserError(
                    f"model: {self.name} gives no gradients: something inside it calls the "
                    "denoiser under torch.no_grad"
                )
            (gradient,) = torch.autograd.grad(output.float().square().mean(), xt)
        if not torch.isfinite(gradient).all():
            raise UserError(f"model: the gradients of {self.name} are not finite")

    def check_guidance(self, scale: float, off: Sequence[Step], on: Sequence[Step]) -> None:
        """Refuse a scale that changes nothing."""
        nothing = all(torch.equal(a.output, b.output) for a, b in zip(off, on, strict=True))
        guidance = self.model.guidance
        if nothing and guidance.arguments(scale, self.cond) != guidance.off(self.cond):
            raise UserError(
                f"rollout.guidance_scale: {scale:g} changes nothing in {self.name}; use 1, which "
                "is no guidance, or more"
            )

    def step_errors(self, samplers: Sequence[Any]) -> list[float]:
        """Return the relative distances of first-order steps from the process's own arithmetic.

        With ``x0`` and ``e`` from the output at one level, the sample at the next level is
        ``corrupt(x0, e)``. One Euler step of a flow, or one step of DDIM, does exactly this.
        """
        base = self.model.pipe.scheduler
        first_order = schedulers.first_order_sampler(base)
        if schedulers.is_continuous(base):
            return [self.x0_error(self.steps(first_order)[0])]
        begin = filter(schedulers.begins_first_order, samplers)
        checked = {type(one): schedulers.on_its_schedule(one) for one in begin}
        checked[type(first_order)] = first_order
        rollouts = map(self.steps, checked.values())
        return [_distance(self.first_order(a, b.level), b.sample.float()) for a, b, *_ in rollouts]

    def first_order(self, step: Step, to: Level) -> Tensor:
        """Return the sample after a first-order step to another level."""
        process = self.model.process
        x0 = process.x0(step.sample, step.output, step.level)
        zero, one = torch.zeros_like(x0), torch.ones_like(x0)
        # what the process adds to x0, divided by its factor
        noise = step.sample.float() - process.corrupt(x0, zero, step.level)
        return process.corrupt(x0, noise / process.corrupt(zero, one, step.level), to)

    def x0_error(self, step: Step) -> float:
        """Return the relative distance between the clean samples that the process and the scheduler
        see in an output: for samplers that add noise at every step, so that none can be foretold.
        """
        ours = self.model.process.x0(step.sample, step.output, step.level)
        sigma = step.level.sigma / math.sqrt(1 - step.level.sigma**2)
        wide = step.sample.float() * math.sqrt(1 + sigma**2)
        own = self.model.pipe.scheduler.precondition_outputs(wide, step.output.float(), sigma)
        return _distance(ours, own)


def _refuse_not_finite(sampler: Any, steps: Sequence[Step]) -> None:
    for before, after in itertools.pairwise(steps):
        if not after.sample.isfinite().all() and before.output.isfinite().all():
            raise UserError(
                f"sampler {type(sampler).__name__}: its step {before.index} makes samples that are "
                f"not finite, of predictions that are"
            )


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max().clamp_min(1e-6))
