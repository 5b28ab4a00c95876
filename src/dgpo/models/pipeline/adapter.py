"""The pipeline is the denoiser.

Rollouts call a diffusers pipeline as a user would, with precomputed prompt embeddings. Training
calls the same pipeline at one point ``(x_t, t)`` and takes what it would hand to
``scheduler.step``, with gradients. Packing of latents, scaling of timesteps, the sign of the
output, guidance and the choice between experts all stay diffusers' own code.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dgpo.core.process import Level, Process
from dgpo.distributed.processes import SINGLE, Processes
from dgpo.distributed.sharding import any_sharded
from dgpo.errors import UserError
from dgpo.media import media_of
from dgpo.models.pipeline import row_groups
from dgpo.models.pipeline.arguments import (
    check_call,
    check_size,
    denoisers_of,
    fixed_arguments,
    parameters_of,
)
from dgpo.models.pipeline.call_encoders import (
    check_text_is_given_once,
    encoder_of,
    remembered_encoding,
)
from dgpo.models.pipeline.families import family_of
from dgpo.models.pipeline.guidance import Guidance
from dgpo.models.pipeline.probes import (
    Evaluated,
    Recording,
    given_latents,
    replaced,
    stand_in_for,
)
from dgpo.models.pipeline.prompt_cache import PromptCache
from dgpo.models.pipeline.prompt_encoder import Conditioning
from dgpo.models.pipeline.rollout import Rollout
from dgpo.models.pipeline.vae_precision import vae_in_its_precision
from dgpo.models.samplers.schedulers import fresh, middle_timestep, process_of
from dgpo.models.weights.memory import free_text_encoders

_SILENT = {"disable": True}
# with one step Mochi's schedule is empty, and a pipeline that starts from a noised picture leaves
# out the first steps; the stand-in stops at the first one that is left
_NOMINAL_STEPS = 100


class _Prepared(Exception):
    """Leaves a call of the pipeline once its latents are there."""

    def __init__(self, latents: Tensor) -> None:
        self.latents = latents


class PipelineModel:
    """A text-to-image or text-to-video pipeline of diffusers, for sampling and for training.

    Args:
        pipe: the pipeline. Its modules stay in place; nothing is wrapped or re-implemented.
        call: extra keyword arguments of the pipeline's call (``height``, ``width``,
            ``max_sequence_length``, ...). What ``encode_prompt`` takes reaches it too.
        prompt_cache: a folder in which prompt embeddings are kept; None: in memory alone.
        processes: those over which the weights of the denoiser are spread, if they are. Rollouts
            and predictions are collective then.

    Raises:
        UserError: the pipeline cannot be trained, or ``call`` holds an argument it does not take.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        call: Mapping[str, Any] | None = None,
        prompt_cache: str | Path | None = None,
        processes: Processes = SINGLE,
    ) -> None:
        self.pipe = pipe
        self.denoisers: dict[str, nn.Module] = denoisers_of(pipe)
        self._processes = processes if any_sharded(self.denoisers.values()) else SINGLE
        self.process: Process = process_of(pipe.scheduler)
        self.call = dict(call or {})
        check_call(pipe, self.call)
        self.parameters = parameters_of(pipe)
        """The parameters of the pipeline's call."""
        self._fixed = fixed_arguments(pipe, self.call)
        self._one_row = family_of(pipe).one_row
        disk = None if prompt_cache is None else PromptCache(prompt_cache, pipe)
        self._encoder = encoder_of(pipe, self.call, disk)
        self._remembered = remembered_encoding(pipe)
        self._picture_each_row: bool | None = None
        self.guidance = Guidance(
            pipe,
            self.denoisers,
            self._fixed,
            lambda t, arguments: self.evaluate(None, t, arguments),
        )
        self._stand_in = stand_in_for(pipe.scheduler)
        # ``__wrapped__`` is the pipeline's call without its torch.no_grad
        self._call_with_grad: Callable[..., Any] = inspect.unwrap(type(pipe).__call__)
        # a pipeline without weights (dgpo plan) draws its numbers on the CPU
        self._scratch = torch.Generator("cpu" if self.device.type == "meta" else self.device)

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
        A :class:`~dgpo.prompts.caption.Caption` brings its pictures along.

        Each distinct prompt is encoded once in the life of this object, while memory allows.

        Raises:
            UserError: no prompts, or pictures for some of them only.
        """
        cond = self._encoder.encode(prompts, guidance)
        return row_groups.with_pictures(cond, prompts, self.parameters)

    def check_pictures(self, prompts: Sequence[str]) -> None:
        """See that the pictures of prompts can be sampled side by side.

        Raises:
            UserError: they lead to samples of different size.
        """
        if "image" in self.parameters:
            row_groups.check_sizes(prompts, self._shape_of)

    @torch.no_grad()
    def _shape_of(self, prompt: str) -> tuple[int, ...]:
        """The shape of the loop's latents; the denoiser is not asked."""
        arguments = self.arguments(self.encode([prompt], guidance=False), 1.0)
        prepare = self.pipe.prepare_latents

        def leave(*given: Any, **named: Any) -> Any:
            made = prepare(*given, **named)
            raise _Prepared(made[0] if isinstance(made, tuple) else made)

        try:
            with replaced(self.pipe, prepare_latents=leave):
                self.evaluate(None, middle_timestep(self.pipe.scheduler), arguments)
        except _Prepared as found:
            return tuple(found.latents.shape)
        raise UserError(f"{type(self.pipe).__name__} prepared no latents")

    def encode_and_free(self, prompts: Iterable[str]) -> None:
        """Encode all prompts, and let go of the text encoders: from then on embeddings come from
        the prompt cache.

        Raises:
            UserError: there is no prompt cache, or the pipeline encodes at every call.
        """
        check_text_is_given_once(self.pipe)
        if self._encoder.disk is None:
            raise UserError("memory.free_text_encoders: set memory.prompt_cache, a folder")
        for prompt in prompts:
            self.encode([prompt], guidance=True)
        free_text_encoders(self.pipe)

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
        rows, spare = self._parts(cond)
        made = [
            self._rollout(
                cond.rows(part) if len(rows) > 1 else cond,
                steps,
                guidance_scale,
                row_groups.for_rows(scheduler, part),
                None if generators is None else [generators[row] for row in part.tolist()],
                decode and place < len(rows),
                record,
            )
            for place, part in enumerate([*rows, *spare])
        ]
        return row_groups.joined(made[: len(rows)], rows)

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
        """One call of the pipeline, for rows that can share it."""
        arguments = self.arguments(cond, guidance_scale)
        own = fresh(self.pipe.scheduler if scheduler is None else scheduler)
        recording = Recording(keep=record)
        recording.listen(own)
        with self.running(arguments, scheduler=own) as given:
            result = self.pipe(
                **given,
                num_inference_steps=steps,
                generator=generators,
                output_type="pil" if decode else "latent",
                return_dict=False,
            )
        if recording.last is None:
            raise UserError(f"{type(self.pipe).__name__} made no scheduler step")
        images = media_of(result[0], self.pipe) if decode else None
        if images is not None:
            check_size(images[0], self.call, type(self.pipe).__name__)
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
        rows, spare = self._parts(cond)
        if len(rows) == 1 and not spare:
            return self.evaluate(xt, level.timestep, self.arguments(cond, guidance_scale))
        made = [
            self.evaluate(xt[part], level.timestep, self.arguments(cond.rows(part), guidance_scale))
            for part in [*rows, *spare]
        ]
        for other in made[len(rows) :]:  # their backward passes are made, too
            made[0] = made[0] + 0 * other.flatten()[0]
        return row_groups.in_order(made[: len(rows)], rows)

    def _parts(self, cond: Conditioning) -> tuple[list[Tensor], list[Tensor]]:
        """The rows that share a call, and those of calls for nothing: while the weights are spread
        over processes, all of these make as many calls as the one that has most. Collective."""
        rows = row_groups.parts(cond, self._one_row)
        counts = self._processes.all_gather_object(
            len(rows), "a pass of sharded weights (train.sharding)"
        )
        return rows, rows[:1] * (max(counts) - len(rows))

    def has_guidance(self, cond: Conditioning) -> bool:
        """Whether classifier-free guidance can be switched on for this conditioning."""
        return self.guidance.exists(cond)

    def evaluate(
        self, xt: Tensor | None, timestep: Tensor, arguments: dict[str, Any], rows: int = 1
    ) -> Tensor:
        """One pass of the pipeline's loop body; ``xt`` None for latents of the pipeline's own, of
        so many rows."""
        stand_in = self._stand_in
        stand_in.point = timestep.detach().reshape(1)
        patches: dict[str, Any] = {"scheduler": stand_in}
        if xt is not None:
            patches["prepare_latents"] = given_latents(self.pipe.prepare_latents, xt)
        try:
            with self.running(arguments, **patches) as given:
                self._call_with_grad(
                    self.pipe,
                    **given,
                    num_inference_steps=_NOMINAL_STEPS,
                    # a list, as in a rollout: some pipelines go another way without
                    generator=[self._scratch] * (rows if xt is None else len(xt)),
                    output_type="latent",
                )
        except Evaluated:
            answer, stand_in.answer = stand_in.answer, None
            return answer
        raise UserError(f"{type(self.pipe).__name__} made no scheduler step")

    @contextmanager
    def running(self, arguments: dict[str, Any], **patches: Any) -> Iterator[dict[str, Any]]:
        """The pipeline for one call with :meth:`arguments`: silent, with some of its parts
        replaced; in the block are the arguments that are left for the call itself."""
        given, guiders = self.guidance.in_guiders(arguments)
        steady = row_groups.steady_encoding(self.pipe, self.parameters)
        patches = {**self._remembered, **guiders, **patches}
        patched = replaced(self.pipe, _progress_bar_config=_SILENT, **patches)
        with vae_in_its_precision(self.pipe), steady, patched:
            yield given

    def arguments(self, cond: Conditioning, guidance_scale: float) -> dict[str, Any]:
        """The arguments of one call of the pipeline, for rows that can share it."""
        guidance = self.guidance.arguments(guidance_scale, cond)
        on = guidance is not self.guidance.off(cond)
        arguments = {**self._fixed, **cond.call_kwargs(on), **guidance}
        shared = row_groups.one_picture(arguments, self.parameters)
        if cond.size == 1 or isinstance(shared.get("image"), list) or "image" not in shared:
            return shared
        if self._picture_each_row is None:
            two = {**self._fixed, **cond.rows(torch.tensor([0, 1])).call_kwargs(on), **guidance}
            one = row_groups.one_picture(two, self.parameters)
            self._picture_each_row = not self._runs(one, 2) and self._runs(two, 2)
        return arguments if self._picture_each_row else shared

    @torch.no_grad()
    def _runs(self, arguments: dict[str, Any], rows: int) -> bool:
        """Whether the pipeline can be called so: some want a picture for each row, some take every
        picture that they are given for one more of the same row."""
        try:
            self.evaluate(None, middle_timestep(self.pipe.scheduler), arguments, rows)
        except Exception:  # whatever a call of another form leads to; the other form is tried
            return False
        return True
