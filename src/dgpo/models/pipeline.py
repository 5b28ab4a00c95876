"""The pipeline is the denoiser.

Rollouts call a diffusers pipeline as a user would, with precomputed prompt embeddings. Training
calls the same pipeline at one point ``(x_t, t)`` and takes what it would hand to
``scheduler.step``, with gradients. Packing of latents, scaling of timesteps, the sign of the
output, guidance and the choice between experts all stay diffusers' own code.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dgpo.core.process import Level, Process
from dgpo.errors import UserError
from dgpo.models import by_picture
from dgpo.models.arguments import (
    check_call,
    denoisers_of,
    fixed_arguments,
    guidance_off_candidates,
    needs_picture,
    parameters_of,
)
from dgpo.models.loop import (
    Evaluated,
    Recording,
    Step,
    given_latents,
    replaced,
    stand_in_for,
)
from dgpo.models.schedulers import fresh, process_of
from dgpo.models.text import Conditioning, PromptEncoder

if TYPE_CHECKING:
    from dgpo.models.check import CheckReport

_SILENT = {"disable": True}
# with one step Mochi's schedule is empty, and a pipeline that starts from a noised picture leaves
# out the first steps; the stand-in stops at the first one that is left
_NOMINAL_STEPS = 100


@dataclass(frozen=True)
class Rollout:
    """Pictures and what training needs to know about how they came to be.

    Args:
        x0: [B, ...], the last sample that the scheduler returned, in the denoiser's input space.
        images: B pictures (for video pipelines B lists of frames); None if not decoded.
        levels: the noise levels of the schedule, from noise to data, each once.
        steps: the scheduler steps that were asked for, with their tensors.
    """

    x0: Tensor
    images: list[Any] | None
    levels: list[Level]
    steps: list[Step] = field(default_factory=list)


class PipelineModel:
    """A text-to-image or text-to-video pipeline of diffusers, for sampling and for training.

    Args:
        pipe: the pipeline. Its modules stay in place; nothing is wrapped or re-implemented.
        call: extra keyword arguments of the pipeline's call (``height``, ``width``,
            ``max_sequence_length``, ...). What ``encode_prompt`` takes reaches it too.

    Raises:
        UserError: the pipeline cannot be trained, or ``call`` holds an argument it does not take.
    """

    def __init__(self, pipe: Any, *, call: Mapping[str, Any] | None = None) -> None:
        self.pipe = pipe
        self.denoisers: dict[str, nn.Module] = denoisers_of(pipe)
        self.process: Process = process_of(pipe.scheduler)
        self.call = dict(call or {})
        check_call(pipe, self.call)
        self.parameters = parameters_of(pipe)
        """The parameters of the pipeline's call."""
        self._fixed = fixed_arguments(pipe, self.call)
        self._encoder = PromptEncoder(pipe, self.call)
        self._guidance_off: dict[str, Any] | None = None
        self._stand_in = stand_in_for(pipe.scheduler)
        # ``__wrapped__`` is the pipeline's call without its torch.no_grad
        self._call_with_grad: Callable[..., Any] = inspect.unwrap(type(pipe).__call__)
        self._scratch = torch.Generator(device=self.device)

    @property
    def encodes_negative(self) -> bool:
        """Whether the pipeline's own ``encode_prompt`` answers for the negative prompt, too."""
        return "do_classifier_free_guidance" in self._encoder.parameters

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return next(next(iter(self.denoisers.values())).parameters()).device

    def encode(self, prompts: Sequence[str], guidance: bool) -> Conditioning:
        """Prompt embeddings, one row a prompt; with ``guidance`` the negative prompt's as well.
        A :class:`~dgpo.caption.Caption` brings its pictures along.

        Each distinct prompt is encoded once in the life of this object, while memory allows.
        """
        cond = self._encoder.encode(prompts, guidance)
        return by_picture.with_pictures(cond, prompts, self.parameters)

    @torch.no_grad()
    def rollout(
        self,
        cond: Conditioning,
        *,
        steps: int,
        guidance_scale: float = 1.0,
        scheduler: Any = None,
        generators: list[torch.Generator] | None = None,
        decode: bool = True,
        record: bool | Container[int] = False,
    ) -> Rollout:
        """Sample one picture for each row of ``cond`` by calling the pipeline.

        Args:
            cond: embeddings of B prompts.
            steps: ``num_inference_steps``.
            guidance_scale: 1 is no guidance; any other value is the pipeline's own
                ``true_cfg_scale`` or ``guidance_scale``.
            scheduler: the sampler; None for the pipeline's own. A fresh copy runs.
            generators: one a row, so that a picture does not depend on its batch; None for the
                global random state.
            decode: whether to decode pictures.
            record: whether to keep the tensors of every step, or the places of those to keep,
                counted from 0.

        Raises:
            UserError: a wrong number of generators, or guidance that the pipeline does not have.
        """
        if generators is not None and len(generators) != cond.size:
            raise UserError(f"got {len(generators)} generators for {cond.size} rows")
        rows = by_picture.parts(cond)
        made = [
            self._rollout(
                cond.rows(part) if len(rows) > 1 else cond,
                steps,
                guidance_scale,
                by_picture.for_rows(scheduler, part),
                None if generators is None else [generators[row] for row in part.tolist()],
                decode,
                record,
            )
            for part in rows
        ]
        return by_picture.joined(made, rows)

    def _rollout(
        self,
        cond: Conditioning,
        steps: int,
        guidance_scale: float,
        scheduler: Any,
        generators: list[torch.Generator] | None,
        decode: bool,
        record: bool | Container[int],
    ) -> Rollout:
        """One call of the pipeline, for rows that share their pictures."""
        arguments = self._arguments(cond, guidance_scale)
        own = fresh(self.pipe.scheduler if scheduler is None else scheduler)
        recording = Recording(keep=record)
        recording.listen(own)
        with replaced(self.pipe, scheduler=own, _progress_bar_config=_SILENT):
            result = self.pipe(
                **arguments,
                num_inference_steps=steps,
                generator=generators,
                output_type="pil" if decode else "latent",
                return_dict=False,
            )
        if recording.last is None:
            raise UserError(f"{type(self.pipe).__name__} made no scheduler step")
        images = list(result[0]) if decode else None
        return Rollout(recording.last, images, recording.levels, recording.steps)

    def predict(
        self, xt: Tensor, level: Level, cond: Conditioning, guidance_scale: float = 1.0
    ) -> Tensor:
        """What the pipeline hands to ``scheduler.step`` at ``xt``, with gradients.

        Args:
            xt: [B, ...], in the denoiser's input space.
            level: one noise level for all rows; its timestep is what the denoiser is given.
            cond: B rows.
            guidance_scale: as in :meth:`rollout`.

        Returns:
            [B, ...], shaped like ``xt``: the velocity, epsilon or v that :attr:`process` speaks of.

        Raises:
            ValueError: ``xt`` has not the shape of the loop's latents, or ``cond`` another size.
        """
        if xt.shape[0] != cond.size:
            raise ValueError(f"got {xt.shape[0]} samples and conditioning for {cond.size}")
        rows = by_picture.parts(cond)
        if len(rows) == 1:
            return self._evaluate(xt, level.timestep, self._arguments(cond, guidance_scale))
        made = [
            self._evaluate(
                xt[part], level.timestep, self._arguments(cond.rows(part), guidance_scale)
            )
            for part in rows
        ]
        return by_picture.in_order(made, rows)

    def has_guidance(self, cond: Conditioning) -> bool:
        """Whether classifier-free guidance can be switched on for this conditioning."""
        possible = cond.guided or "negative_prompt_embeds" not in self.parameters
        return possible and bool(self._off(cond))

    def self_check(self, cond: Conditioning | None = None) -> CheckReport:
        """Compare :meth:`predict` with the pipeline bit by bit; see
        :func:`dgpo.models.check.self_check`."""
        from dgpo.models.check import self_check  # it needs this module

        return self_check(self, cond)

    def _evaluate(self, xt: Tensor | None, timestep: Tensor, arguments: dict[str, Any]) -> Tensor:
        """One pass of the pipeline's loop body; ``xt`` None for latents of the pipeline's own."""
        stand_in = self._stand_in
        stand_in.point = timestep.detach().reshape(1)
        patches: dict[str, Any] = {"scheduler": stand_in, "_progress_bar_config": _SILENT}
        if xt is not None:
            patches["prepare_latents"] = given_latents(self.pipe.prepare_latents, xt)
        try:
            with replaced(self.pipe, **patches):
                self._call_with_grad(
                    self.pipe,
                    **arguments,
                    num_inference_steps=_NOMINAL_STEPS,
                    generator=self._scratch,
                    output_type="latent",
                )
        except Evaluated:
            answer, stand_in.answer = stand_in.answer, None
            return answer
        raise UserError(f"{type(self.pipe).__name__} made no scheduler step")

    def _arguments(self, cond: Conditioning, guidance_scale: float) -> dict[str, Any]:
        guidance = self._guidance(guidance_scale, cond)
        on = guidance is not self._guidance_off
        arguments = {**self._fixed, **cond.call_kwargs(on), **guidance}
        return by_picture.one_picture(arguments, self.parameters)

    def _guidance(self, scale: float, cond: Conditioning) -> dict[str, Any]:
        off = self._off(cond)
        if scale == 1.0 or scale in off.values():
            return off
        if not off:
            raise UserError(
                f"guidance_scale={scale}: {type(self.pipe).__name__} has no classifier-free "
                "guidance; use 1.0 (an embedded guidance is rollout.call.guidance_scale)"
            )
        if "negative_prompt_embeds" in self.parameters and not cond.guided:
            raise UserError(f"guidance_scale={scale} needs prompts encoded with guidance=True")
        return dict.fromkeys(off, scale)

    def _off(self, cond: Conditioning) -> dict[str, Any]:
        if self._guidance_off is None:
            self._guidance_off = self._find_guidance_off(cond.rows(torch.tensor([0])))
        return self._guidance_off

    def _find_guidance_off(self, one_row: Conditioning) -> dict[str, Any]:
        """The first candidate with which one step is one denoiser call of one row a sample."""
        embeddings = dict(one_row.kwargs)
        for name, value in one_row.kwargs.items():
            if f"negative_{name}" in self.parameters:
                # a candidate that leaves guidance on must get as far as the denoiser
                embeddings.setdefault(f"negative_{name}", value)
        if needs_picture(self.pipe) and "image" not in embeddings:
            raise UserError(
                f"model: {type(self.pipe).__name__} starts from a picture: give every prompt row "
                "'image', a file (for dgpo check: --image FILE)"
            )
        for candidate in guidance_off_candidates(self.pipe):
            arguments = {**self._fixed, **embeddings, **candidate}
            if self._denoiser_rows(by_picture.one_picture(arguments, self.parameters)) == [1]:
                return candidate
        raise UserError(f"model: cannot switch guidance off in {type(self.pipe).__name__}")

    @torch.no_grad()
    def _denoiser_rows(self, arguments: dict[str, Any]) -> list[int]:
        """The batch size of each denoiser call in one step."""
        rows: list[int] = []

        def count(module: nn.Module, inputs: Any, output: Any) -> None:
            rows.append(len(output[0]))

        hooks = [m.register_forward_hook(count) for m in self.denoisers.values()]
        schedule = self.pipe.scheduler.timesteps
        try:
            self._evaluate(None, schedule[len(schedule) // 2], arguments)
        finally:
            for hook in hooks:
                hook.remove()
        return rows
