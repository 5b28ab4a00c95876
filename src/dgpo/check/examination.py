"""A pipeline that is examined: each question of `compatibility`, answered by doing it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from dgpo.check.trial import two_iterations
from dgpo.core.sde import DDIM, FlowSDE
from dgpo.errors import UserError
from dgpo.models.pipeline.adapter import PipelineModel
from dgpo.models.pipeline.prompt_encoder import Conditioning
from dgpo.models.pipeline.rollout import Rollout
from dgpo.models.pipeline.row_groups import with_pictures
from dgpo.models.pipeline.self_check import CheckReport, is_narrow, self_check
from dgpo.models.policy import Policy
from dgpo.models.samplers.schedulers import is_flow_matching
from dgpo.models.samplers.sde_schedulers import make_sde_scheduler, with_noise
from dgpo.models.weights import lora
from dgpo.models.weights.snapshots import fingerprints
from dgpo.prompts import Prompt
from dgpo.prompts.caption import Caption
from dgpo.recipe.sections import LoraSettings

Verdict = Literal["yes", "none", "refused", "no"]
PROMPTS = (
    "a cat",
    "a photo of a red square on the big table beside the small blue house of the dog, which looks "
    "out of the window on a bright day",
)
"""What is asked with: a few tokens beside more than sixteen, to which some pipelines pad."""
_STEPS = 3


@dataclass(frozen=True)
class Answer:
    """One answer: ``yes``; ``none`` where the pipeline has no such thing; ``refused`` where dgpo
    says with a message that it will not; ``no`` where it differs, which must never be.

    Args:
        verdict: the answer.
        note: what is particular about it; the same on every machine.
        figures: what was measured.
    """

    verdict: Verdict
    note: str = ""
    figures: str = ""

    @property
    def cell(self) -> str:
        """The answer in a table."""
        return f"{self.verdict}: {self.note}" if self.note else self.verdict


class Differs(Exception):
    """An answer of no, with what differs."""


@dataclass(frozen=True)
class Base:
    """What the model makes before it is trained.

    Args:
        cond: of the prompts.
        made: a rollout with all its steps for each guidance scale.
    """

    cond: Conditioning
    made: Mapping[float, Rollout]


@dataclass
class Case:
    """A pipeline that is being examined, and what earlier questions have left for later ones."""

    make: Callable[[], Any]
    wrap: Callable[[Any], PipelineModel]
    model: PipelineModel
    rows: list[Prompt]
    _report: CheckReport | None = None
    _base: Base | None = None
    _policy: Policy | None = None
    _targets: list[str] = field(default_factory=list)

    def points(self) -> Answer:
        self._report = self_check(self.model, self._encoded(self.texts))
        count = sum(p.guidance_scale == 1.0 for p in self._report.points)
        return Answer("yes", figures=f"{count} points, step error {self._report.step_error:.1e}")

    def guidance(self) -> Answer:
        if self._report is None:
            return Answer("refused", "as without guidance")
        count = sum(p.guidance_scale != 1.0 for p in self._report.points)
        return Answer("yes", figures=f"{count} points") if count else Answer("none")

    def prompts(self) -> Answer:
        if not _has_encoders(self.model.pipe):
            return Answer("none", "embeddings were given: no text encoder here")
        alone: dict[float, list[Tensor]] = {scale: [] for scale in self._scales()}
        for scale, rows in alone.items():
            for row, prompt in enumerate(self.texts):
                ours = _rollout(self.model, self._encoded([prompt]), scale, row).x0
                theirs = _rollout(self.model, _text(self.model, prompt), scale, row).x0
                if not torch.equal(ours, theirs):
                    far = float((ours - theirs).abs().max())
                    raise Differs(f"guidance {scale:g}, prompt {prompt!r}: by {far:.1e}")
                rows.append(ours)
        both = self._encoded(self.texts)
        far = max(_distance(_rollout(self.model, both, s).x0, torch.cat(alone[s])) for s in alone)
        if not far <= (1e-1 if is_narrow(self.model) else 1e-3):
            raise Differs(f"a prompt beside a longer one: by {far:.1e} of the sample")
        note = "prompts of different length in batches of their own" if both.ragged else ""
        return Answer("yes", note, f"beside a longer prompt within {far:.0e}")

    def noise(self) -> Answer:
        base = self.model.pipe.scheduler
        sde = FlowSDE() if is_flow_matching(base) else DDIM()
        sampler = make_sde_scheduler(sde, base)
        cond, count = self._encoded(self.texts), 0
        for scale in self._scales():
            noisy = with_noise(sampler, range(_STEPS - 1), range(cond.size))
            made = _rollout(self.model, cond, scale, scheduler=noisy, record=True)
            for step, then in zip(made.steps[:-1], made.levels[1:], strict=True):
                with torch.no_grad():
                    again = self.model.predict(step.sample, step.level, cond, scale)
                now, old = (
                    sde.log_prob(
                        step.previous,
                        sde.moments(self.model.process, step.sample, output, step.level, then),
                    )
                    for output in (again, step.output)
                )
                ratio = (now - old).exp()
                if not torch.equal(ratio, torch.ones_like(ratio)):
                    raise Differs(f"guidance {scale:g}: by {float((ratio - 1).abs().max()):.1e}")
                count += 1
        return Answer("yes", figures=f"{type(sde).__name__}, {count} points")

    def dgpo(self) -> Answer:
        model = self.model
        _freeze(model.pipe)  # as the policy will
        cond = self._encoded(self.texts)
        with _listening(model) as asked:
            made = {s: _rollout(model, cond, s, record=True) for s in self._scales()}
        if missing := [name for name in model.denoisers if name not in asked]:
            raise UserError(f"{missing[0]} is not asked at any of {_STEPS} steps")
        self._targets = lora.fitting_targets(model.denoisers)
        settings = LoraSettings(rank=4, alpha=12, targets=self._targets)
        policy = Policy(model, settings)
        self._base, self._policy = Base(cond, made), policy
        modules, trained = model.pipe.components.values(), _trained(model)
        frozen = fingerprints(modules, policy.parameters())
        before = {name: [p.detach().clone() for p in those] for name, those in trained.items()}
        losses = two_iterations(policy, self.rows, len(made[1.0].levels))
        if is_narrow(model) and not all(then < first for first, then in losses):
            # what small steps change may be less than what half precision rounds
            losses = two_iterations(policy, self.rows, len(made[1.0].levels), lr=1e-2)
        for first, then in losses:
            if not then < first:
                raise Differs(f"the objective went from {first:.6f} to {then:.6f}")
        for name, those in trained.items():
            if all(map(torch.equal, before[name], those)):
                raise Differs(f"no trained weight of {name} moved")
        after = fingerprints(modules, policy.parameters())
        if moved := [name for name in frozen if frozen[name] != after[name]]:
            raise Differs(f"{moved[0]} moved, and {len(moved) - 1} more that are frozen")
        went = ", ".join(f"{first:.5f} to {then:.5f}" for first, then in losses)
        return Answer("yes", figures=f"{went}; lora.targets {', '.join(self._targets)}")

    def reference(self) -> Answer:
        if self._policy is None or self._base is None:
            return Answer("refused", "no policy")
        generator = torch.Generator().manual_seed(3)
        for parameter in self._policy.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            parameter.data += 0.05 * noise
        count = 0
        for scale, made in self._base.made.items():
            for step in made.steps:
                cond = self._base.cond
                with torch.no_grad():
                    reference = self._policy.predict(step.sample, step.level, cond, "ref", scale)
                if not torch.equal(reference, step.output):
                    far = float((reference - step.output).abs().max())
                    where = f"t={float(step.level.timestep):g}"
                    raise Differs(f"guidance {scale:g}, {where}: by {far:.1e}")
                count += 1
        return Answer("yes", figures=f"{count} points")

    def lora_file(self) -> Answer:
        if self._policy is None or self._base is None:
            return Answer("refused", "no policy")
        cond, base = self._base.cond, {s: made.x0 for s, made in self._base.made.items()}
        _freeze(self.model.pipe)  # as the pipeline will be that loads the LoRA
        narrow = is_narrow(self.model)
        with TemporaryDirectory() as folder:
            self._policy.save(folder, "policy")
            if narrow:
                lora.rounded(self.model.denoisers)
            trained = {scale: _rollout(self.model, cond, scale).x0 for scale in base}
            del self._policy, self.model  # room for another pipeline
            self._policy = None
            fresh = self.wrap(self.make())
            how = lora.load(fresh.pipe, Path(folder))
        _freeze(fresh.pipe)

        def off() -> float:
            """The largest difference, beside what the LoRA does, of which rounding is a part."""
            made = {scale: _rollout(fresh, cond, scale).x0 for scale in trained}
            return max(
                float((made[s] - x0).abs().max() / (x0 - base[s]).abs().max())
                for s, x0 in trained.items()
            )

        far = off()
        figures = "bit for bit" if far == 0.0 else f"within {far:.0e}"
        if narrow:
            # which multiplies in half precision where training does in float32
            figures = f"{figures} in its precision"
            lora.widened(fresh.denoisers)
            far = off()
            figures = f"bit for bit in float32, {figures}" if far == 0.0 else figures
        if not far <= (1e-2 if narrow else 1e-5):
            raise Differs(f"by {far:.1e} of what the LoRA changes")
        return Answer("yes", "" if how == "diffusers" else f"by {how}", figures)

    @property
    def texts(self) -> list[str]:
        return [row.text for row in self.rows]

    def _encoded(self, prompts: Sequence[str]) -> Conditioning:
        return self.model.encode(prompts, guidance=True)

    def _scales(self) -> list[float]:
        guided = self._report is not None and any(
            point.guidance_scale != 1.0 for point in self._report.points
        )
        return [1.0, 3.0] if guided else [1.0]


def _rollout(
    model: PipelineModel, cond: Conditioning, scale: float = 1.0, first: int = 0, **how: Any
) -> Rollout:
    generators = [torch.Generator().manual_seed(first + row) for row in range(cond.size)]
    return model.rollout(
        cond, steps=_STEPS, guidance_scale=scale, generators=generators, decode=False, **how
    )


def _freeze(pipe: Any) -> None:
    """No weight wants gradients: torch rounds a product otherwise where one does."""
    for module in pipe.components.values():
        if isinstance(module, nn.Module):
            module.requires_grad_(False)


def _trained(model: PipelineModel) -> dict[str, list[Tensor]]:
    """What is trained of each denoiser."""
    return {
        name: [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
        for name, denoiser in model.denoisers.items()
    }


@contextmanager
def _listening(model: PipelineModel) -> Iterator[set[str]]:
    """The names of the denoisers that are called inside the block."""
    asked: set[str] = set()
    hooks = [
        denoiser.register_forward_pre_hook(lambda *_, name=name: asked.add(name))
        for name, denoiser in model.denoisers.items()
    ]
    try:
        yield asked
    finally:
        for hook in hooks:
            hook.remove()


def _distance(a: Tensor, b: Tensor) -> float:
    """Relative to the largest number."""
    return float((a - b).abs().max() / b.abs().max())


def _has_encoders(pipe: Any) -> bool:
    return any(n.startswith("tokenizer") and c is not None for n, c in pipe.components.items())


def _text(model: PipelineModel, prompt: str) -> Conditioning:
    """A prompt as a user gives it: the pipeline encodes it itself."""
    given: dict[str, Any] = {"prompt": [prompt]}
    if "negative_prompt" in model.parameters:
        negative = model.call.get("negative_prompt", model.parameters["negative_prompt"].default)
        if negative is None and not model.encodes_negative:
            negative = ""  # without a text of its own the pipeline would leave guidance off
        given["negative_prompt"] = None if negative is None else [negative]
    elif "negative_prompt_embeds" in model.parameters:
        given["negative_prompt_embeds"] = None
    return with_pictures(Conditioning(given, 1), [prompt], model.parameters)


def check_rows(picture: Image.Image | None, mask: Image.Image | None) -> list[Prompt]:
    """The two prompts of the questions, the second with the mirror images of the pictures."""
    given = {"image": picture, "mask": mask}
    first = {name: one for name, one in given.items() if one is not None}
    if not first:
        return [Prompt(text) for text in PROMPTS]
    pictures = [first, {name: ImageOps.mirror(one) for name, one in first.items()}]
    texts = map(Caption, PROMPTS, pictures)
    return [Prompt(text, dict(text.files)) for text in texts]
