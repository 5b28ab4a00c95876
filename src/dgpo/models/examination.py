"""A pipeline that is examined: each question of `compatibility`, answered by doing it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from dgpo.algorithms.dgpo import DGPO
from dgpo.core.sde import DDIM, FlowSDE
from dgpo.core.timesteps import TimestepChoice
from dgpo.errors import UserError
from dgpo.models import lora
from dgpo.models.by_picture import with_pictures
from dgpo.models.check import CHECK_PROMPTS, CheckReport
from dgpo.models.loop import Step
from dgpo.models.pipeline import PipelineModel
from dgpo.models.policy import Policy
from dgpo.models.schedulers import is_flow_matching
from dgpo.models.sde_schedulers import make_sde_scheduler, with_noise
from dgpo.models.snapshots import fingerprints
from dgpo.models.text import Conditioning
from dgpo.prompts import Prompt
from dgpo.prompts.caption import Caption
from dgpo.recipe import Recipe
from dgpo.recipe.sections import LoraSettings
from dgpo.rewards import load_rewards
from dgpo.rewards.stand_in import level
from dgpo.training.collection import collect
from dgpo.training.updating import Updater

Verdict = Literal["yes", "none", "refused", "no"]
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


@dataclass
class Case:
    """A pipeline that is being examined, and what earlier questions have left for later ones."""

    make: Callable[[], Any]
    wrap: Callable[[Any], PipelineModel]
    model: PipelineModel
    rows: list[Prompt]
    _report: CheckReport | None = None
    _point: tuple[Step, Conditioning, Tensor] | None = None
    _policy: Policy | None = None
    _targets: list[str] = field(default_factory=list)

    def points(self) -> Answer:
        self._report = self.model.self_check(self._encoded(self.texts))
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
        try:
            both = self._encoded(self.texts)
        except UserError:
            return Answer("yes", "prompts of different length in batches of their own")
        far = max(_distance(_rollout(self.model, both, s).x0, torch.cat(alone[s])) for s in alone)
        if not far <= (1e-1 if alone[1.0][0].dtype.itemsize < 4 else 1e-3):
            raise Differs(f"a prompt beside a longer one: by {far:.1e} of the sample")
        return Answer("yes", figures=f"beside a longer prompt within {far:.0e}")

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
        cond = self._encoded(self.texts)
        step = _rollout(model, cond, record=True).steps[1]
        for module in model.pipe.components.values():
            if isinstance(module, nn.Module):
                # as the policy will: torch rounds a product otherwise if weights want gradients
                module.requires_grad_(False)
        with torch.no_grad():
            base = model.predict(step.sample, step.level, cond)
        self._point = (step, cond, base)
        self._targets = lora.fitting_targets(model.denoisers)
        settings = LoraSettings(rank=4, alpha=12, targets=self._targets)
        policy = self._policy = Policy(model, settings)
        trained, modules = policy.parameters(), model.pipe.components.values()
        frozen = fingerprints(modules, trained)
        before = [parameter.detach().clone() for parameter in trained]
        losses = _train(policy, self.rows)
        if not losses[-1] < losses[0]:
            raise Differs(f"the objective went from {losses[0]:.6f} to {losses[-1]:.6f}")
        if all(torch.equal(a, b) for a, b in zip(before, trained, strict=True)):
            raise Differs("no trained weight moved")
        after = fingerprints(modules, trained)
        if moved := [name for name in frozen if frozen[name] != after[name]]:
            raise Differs(f"{moved[0]} moved, and {len(moved) - 1} more that are frozen")
        targets = f"lora.targets {', '.join(self._targets)}"
        return Answer("yes", figures=f"{losses[0]:.5f} to {losses[-1]:.5f}; {targets}")

    def reference(self) -> Answer:
        if self._policy is None or self._point is None:
            return Answer("refused", "no policy")
        generator = torch.Generator().manual_seed(3)
        for parameter in self._policy.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            parameter.data += 0.05 * noise
        step, cond, base = self._point
        reference = self._policy.predict(step.sample, step.level, cond, "ref")
        if not torch.equal(reference, base):
            raise Differs(f"by {float((reference - base).abs().max()):.1e}")
        return Answer("yes")

    def lora_file(self) -> Answer:
        if self._policy is None or self._point is None:
            return Answer("refused", "no policy")
        step, cond, base = self._point
        with torch.no_grad():
            trained = self._policy.predict(step.sample, step.level, cond)
        narrow = trained.dtype.itemsize < 4
        with TemporaryDirectory() as folder:
            self._policy.save(folder, "policy")
            del self._policy, self.model  # room for another pipeline
            self._policy = None
            fresh = self.wrap(self.make())
            how = lora.load(fresh.pipe, Path(folder))
        with torch.no_grad():
            loaded = fresh.predict(step.sample, step.level, cond)
        # relative to what the LoRA does, of which rounding is a small part
        far = float((loaded - trained).abs().max() / (trained - base).abs().max())
        if not far <= (1e-1 if narrow else 1e-3):
            raise Differs(f"by {far:.1e} of what the LoRA changes")
        return Answer("yes", "" if how == "diffusers" else f"by {how}", f"within {far:.0e}")

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
) -> Any:
    generators = [torch.Generator().manual_seed(first + row) for row in range(cond.size)]
    return model.rollout(
        cond, steps=_STEPS, guidance_scale=scale, generators=generators, decode=False, **how
    )


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
        return [Prompt(text) for text in CHECK_PROMPTS]
    pictures = [first, {name: ImageOps.mirror(one) for name, one in first.items()}]
    texts = map(Caption, CHECK_PROMPTS, pictures)
    return [Prompt(text, dict(text.files)) for text in texts]


def _train(policy: Policy, prompts: Sequence[Prompt]) -> list[float]:
    """DGPO's objective on the points of one iteration, before it, and after one and two steps."""
    # scaled as in the paper, the loss is the objective: log 2 at the start
    algorithm = DGPO(loss_scale="paper", timesteps=TimestepChoice(count=2, indices=None))
    recipe = Recipe.from_dict(
        {
            "group_size": 3,
            "groups_per_iteration": 2,
            "rollout": {"steps": _STEPS},
            "train": {"iterations": 3, "lr": 1e-3},
            "algorithm": {"name": "dgpo", **algorithm.model_dump()},
        }
    )
    batch = collect(policy, load_rewards(level), algorithm, prompts, recipe, 0, None).batch
    if batch is None:
        raise UserError("the samples of a group are all alike: there is nothing to compare")
    updater = Updater(policy, algorithm, recipe)
    return [updater.update(batch, iteration=0)["loss"] for _ in range(3)]
