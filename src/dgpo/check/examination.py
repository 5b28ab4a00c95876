"""A pipeline under examination: it answers each question of ``compatibility`` by doing it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from dgpo.check.trial import two_iterations
from dgpo.core.sde import DDIM, FlowSDE
from dgpo.errors import UserError
from dgpo.media import Lost
from dgpo.models.loras import load_lora
from dgpo.models.pipeline.adapter import PipelineModel
from dgpo.models.pipeline.decoding import safety_checker_of
from dgpo.models.pipeline.prompt_encoder import Conditioning
from dgpo.models.pipeline.rollout import Rollout
from dgpo.models.pipeline.row_groups import with_pictures
from dgpo.models.pipeline.self_check import CheckReport, is_narrow, self_check
from dgpo.models.policy import Policy, Weights
from dgpo.models.samplers.schedulers import is_flow_matching
from dgpo.models.samplers.sde_schedulers import make_sde_scheduler, with_noise
from dgpo.models.weights import lora_passes
from dgpo.models.weights.compute import is_compiled
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
"""The prompts of the questions: a few tokens beside more than sixteen, to which some pipelines
pad."""
_STEPS = 3
_WEIGHTS: tuple[Weights, ...] = ("old", "ref", "policy")


@dataclass(frozen=True)
class Answer:
    """An ``Answer`` is the answer to one question.

    Args:
        verdict: ``yes``; ``none`` if the pipeline has no such thing; ``refused`` if dgpo declines
            with a message; ``no`` if something differs, which must never be.
        note: what is particular about the answer; the same on every machine.
        figures: what was measured.
    """

    verdict: Verdict
    note: str = ""
    figures: str = ""

    @property
    def cell(self) -> str:
        """Return the answer in a table."""
        return f"{self.verdict}: {self.note}" if self.note else self.verdict


class Differs(Exception):
    """The answer is no; the message says what differs."""


@dataclass(frozen=True)
class Trained:
    """``Trained`` holds a policy, and what its model made before it was trained.

    Args:
        policy: after its updates.
        cond: the conditioning of the prompts.
        made: for each guidance scale a rollout with all its steps, before training.
    """

    policy: Policy
    cond: Conditioning
    made: Mapping[float, Rollout]


@dataclass
class Case:
    """A ``Case`` is a pipeline under examination, and what questions leave for later ones."""

    make: Callable[[], Any]
    wrap: Callable[[Any], PipelineModel]
    model: PipelineModel
    rows: list[Prompt]
    _report: CheckReport | None = None
    _trained: Trained | None = None

    def decoded(self) -> Answer:
        """Can rewards be shown what it makes?"""
        generators = [torch.Generator().manual_seed(row) for row in range(len(self.rows))]
        cond = self._encoded(self.texts)
        made = self.model.rollout(cond, steps=_STEPS, generators=generators).images or []
        if lost := [one.why for one in made if isinstance(one, Lost)]:
            raise Differs(f"{len(lost)} of {len(made)} samples are lost: {lost[0]}")
        checker = safety_checker_of(self.model.pipe)
        off = f"its safety checker ({type(checker).__name__}) is off in dgpo" if checker else ""
        return Answer("yes", off)

    def points(self) -> Answer:
        """Is what is trained what samples?"""
        self._report = self_check(self.model, self._encoded(self.texts))
        count = sum(p.guidance_scale == 1.0 for p in self._report.points)
        return Answer("yes", figures=f"{count} points, step error {self._report.step_error:.1e}")

    def guidance(self) -> Answer:
        """Is it so with guidance, too? The first question has found out."""
        if self._report is None:
            return Answer("refused", "as without guidance")
        count = sum(p.guidance_scale != 1.0 for p in self._report.points)
        return Answer("yes", figures=f"{count} points") if count else Answer("none")

    def prompts(self) -> Answer:
        """Do precomputed embeddings give what the pipeline gives for the text?"""
        if not _has_encoders(self.model.pipe):
            return Answer("none", "embeddings were given: no text encoder here")
        alone: dict[float, list[Tensor]] = {scale: [] for scale in self._scales()}
        for scale, rows in alone.items():
            # one by one: beside a longer prompt the pipeline's own padding may differ
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
        """Is a policy gradient's ratio exactly 1 before the first update?"""
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
        """Do two iterations lower the objective, and move nothing but the LoRA?"""
        model = self.model
        _freeze(model.pipe)  # as the policy will: what is made here is compared with what it makes
        cond = self._encoded(self.texts)
        asked: set[str] = set()
        with ExitStack() as hooks:
            for name, denoiser in model.denoisers.items():
                note = denoiser.register_forward_pre_hook(lambda *_, name=name: asked.add(name))
                hooks.enter_context(note)
            made = {s: _rollout(model, cond, s, record=True) for s in self._scales()}
        if missing := [name for name in model.denoisers if name not in asked]:
            raise UserError(f"{missing[0]} is not asked at any of {_STEPS} steps")
        policy = Policy(model, LoraSettings(rank=4, alpha=12))
        self._trained = Trained(policy, cond, made)
        modules, trained = model.pipe.components.values(), _trainable(model)
        frozen = fingerprints(modules, policy.parameters())
        before = {name: [p.detach().clone() for p in those] for name, those in trained.items()}
        losses = two_iterations(policy, self.rows, len(made[1.0].levels))
        if is_narrow(model) and not all(then < first for first, then in losses):
            # half precision may round away what small steps change
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
        return Answer("yes", figures=f"{went}; lora.targets {', '.join(policy.targets)}")

    def reference(self) -> Answer:
        """Is the reference still the base model once the LoRA has moved?"""
        if (trained := self._trained) is None:
            return Answer("refused", "no policy")
        policy, cond, count = trained.policy, trained.cond, 0
        # a graph with a LoRA in it may round elsewhere than the base's
        allowed = self._compiled_off if policy.passes.gated else 0.0
        generator = torch.Generator().manual_seed(3)
        for parameter in policy.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            parameter.data += 0.05 * noise
        for scale, made in trained.made.items():
            for step in made.steps:
                with torch.no_grad():
                    reference = policy.predict(step.sample, step.level, cond, "ref", scale)
                if not torch.equal(reference, step.output):
                    far = float((reference - step.output).abs().max())
                    if far <= allowed * float(step.output.abs().max()):
                        continue
                    where = f"t={float(step.level.timestep):g}"
                    raise Differs(f"guidance {scale:g}, {where}: by {far:.1e}")
                count += 1
        return Answer("yes", figures=f"{count} points")

    def compiled(self) -> Answer:
        """Do compiled passes equal eager ones, and is none compiled anew?"""
        if (trained := self._trained) is None:
            return Answer("refused", "no policy")
        policy = trained.policy

        def passes() -> list[Tensor]:
            """Return the predictions with all weights, and the gradient of one."""
            made: list[Tensor] = []
            for scale, rollout in trained.made.items():
                point = rollout.steps[0].sample, rollout.steps[0].level, trained.cond
                made += [policy.predict(*point, weights, scale) for weights in _WEIGHTS]
                loss = made[-1].float().square().mean()
                found = torch.autograd.grad(loss, policy.parameters(), allow_unused=True)
                made.append(torch.cat([one.flatten() for one in found if one is not None]))
            return [one.detach() for one in made]

        for _ in range(2):  # the second size of a batch may be compiled for all sizes
            passes()
        with torch.compiler.set_stance("fail_on_recompile"):
            ours = passes()
        with torch.compiler.set_stance("force_eager"):
            eager = passes()
        far = max(map(_distance, ours, eager))
        if not far <= self._compiled_off:
            raise Differs(f"by {far:.1e} from eager passes")
        return Answer("yes", figures=f"{len(ours)} passes within {far:.0e} of eager ones")

    @property
    def _compiled_off(self) -> float:
        """Return how far compiled passes may be off, relative to the largest number."""
        return 5e-2 if is_narrow(self.model) else 1e-4

    def lora_file(self) -> Answer:
        """Does a fresh pipeline with the saved LoRA sample what the trained one does?"""
        if self._trained is None:
            return Answer("refused", "no policy")
        cond, base = self._trained.cond, {s: made.x0 for s, made in self._trained.made.items()}
        _freeze(self.model.pipe)  # as the pipeline that loads the LoRA will be
        narrow = is_narrow(self.model)
        with TemporaryDirectory() as folder:
            self._trained.policy.save(folder, "policy")
            if narrow:
                lora_passes.rounded(self.model.denoisers)
                # to be compared bit for bit, both LoRAs multiply in float32
                lora_passes.widened(self.model.denoisers)
            # eager, as the fresh pipeline is; made where it is needed, as making it sets it
            compiled = is_compiled(self.model.denoisers)
            with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
                trained = {scale: _rollout(self.model, cond, scale).x0 for scale in base}
            self._trained = None
            del self.model  # room for another pipeline
            fresh = self.wrap(self.make())
            how = read_back(fresh.pipe, Path(folder))
        _freeze(fresh.pipe)

        def off() -> float:
            """Return the largest difference, relative to what the LoRA changes."""
            made = {scale: _rollout(fresh, cond, scale).x0 for scale in trained}
            return max(
                float((made[s] - x0).abs().max() / (x0 - base[s]).abs().max())
                for s, x0 in trained.items()
            )

        far = off()
        figures = "bit for bit" if far == 0.0 else f"within {far:.0e}"
        if narrow:
            figures = f"{figures} in its precision"
            lora_passes.widened(fresh.denoisers)
            far = off()
            figures = f"bit for bit in float32, {figures}" if far == 0.0 else figures
        if not far <= (1e-2 if narrow else 1e-5):
            raise Differs(f"by {far:.1e} of what the LoRA changes")
        return Answer("yes", how, figures)

    @property
    def texts(self) -> list[str]:
        """Return the texts of the prompts."""
        return [row.text for row in self.rows]

    def _encoded(self, prompts: Sequence[str]) -> Conditioning:
        return self.model.encode(prompts, guidance=True)

    def _scales(self) -> list[float]:
        guided = self._report is not None and any(
            point.guidance_scale != 1.0 for point in self._report.points
        )
        return [1.0, 3.0] if guided else [1.0]


def read_back(pipe: Any, folder: Path) -> str:
    """Read a saved LoRA as users of diffusers will; return who read it, if not the pipeline."""
    if not hasattr(pipe, "load_lora_weights"):
        load_lora(pipe, folder)
        return "by peft"
    pipe.load_lora_weights(folder)
    if (folder / "transformer_2").is_dir():
        pipe.load_lora_weights(folder / "transformer_2", load_into_transformer_2=True)
    return ""


def _rollout(
    model: PipelineModel, cond: Conditioning, scale: float = 1.0, first: int = 0, **how: Any
) -> Rollout:
    generators = [torch.Generator().manual_seed(first + row) for row in range(cond.size)]
    return model.rollout(
        cond, steps=_STEPS, guidance_scale=scale, generators=generators, decode=False, **how
    )


def _freeze(pipe: Any) -> None:
    """Switch off all gradients: with them torch may round a product differently."""
    for module in pipe.components.values():
        if isinstance(module, nn.Module):
            module.requires_grad_(False)


def _trainable(model: PipelineModel) -> dict[str, list[Tensor]]:
    """Return the weights of each denoiser that are trained."""
    return {
        name: [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
        for name, denoiser in model.denoisers.items()
    }


def _distance(a: Tensor, b: Tensor) -> float:
    """Return the largest difference, relative to the largest number."""
    return float((a - b).abs().max() / b.abs().max())


def _has_encoders(pipe: Any) -> bool:
    return any(n.startswith("tokenizer") and c is not None for n, c in pipe.components.items())


def _text(model: PipelineModel, prompt: str) -> Conditioning:
    """Return a prompt as a user gives it, so that the pipeline encodes it itself."""
    given: dict[str, Any] = {"prompt": [prompt]}
    if "negative_prompt" in model.parameters:
        negative = model.call.get("negative_prompt", model.parameters["negative_prompt"].default)
        if negative is None and not model.encodes_negative:
            negative = ""  # with None the pipeline would leave guidance off
        given["negative_prompt"] = None if negative is None else [negative]
    elif "negative_prompt_embeds" in model.parameters:
        given["negative_prompt_embeds"] = None
    return with_pictures(Conditioning(given, 1), [prompt], model.parameters)


def check_rows(picture: Image.Image | None, mask: Image.Image | None) -> list[Prompt]:
    """Return the two prompts of the questions; the second has the mirror images of the pictures."""
    given = {"image": picture, "mask": mask}
    first = {name: one for name, one in given.items() if one is not None}
    if not first:
        return [Prompt(text) for text in PROMPTS]
    pictures = [first, {name: ImageOps.mirror(one) for name, one in first.items()}]
    texts = map(Caption, PROMPTS, pictures)
    return [Prompt(text, dict(text.files)) for text in texts]
