"""One call of a pipeline: its arguments, and how it is stopped at a single point of its loop."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dgpo.distributed.sharding import device_of
from dgpo.errors import UserError
from dgpo.media import made_of
from dgpo.models.pipeline import probes, row_groups
from dgpo.models.pipeline.arguments import (
    check_call,
    check_size,
    denoisers_of,
    fixed_arguments,
    parameters_of,
)
from dgpo.models.pipeline.call_encoders import remembered_encoding
from dgpo.models.pipeline.decoding import decoders_watched
from dgpo.models.pipeline.guidance import Guidance
from dgpo.models.pipeline.prompt_encoder import Conditioning
from dgpo.models.pipeline.rollout import Rollout
from dgpo.models.pipeline.vae_precision import vae_in_its_precision
from dgpo.models.samplers.schedulers import fresh, middle_timestep
from dgpo.user_code import user_code

_SILENT = {"disable": True}
# with one step Mochi's schedule is empty, and a pipeline that starts from a noised picture leaves
# out the first steps; the stand-in stops at the first step that is left
_NOMINAL_STEPS, _NOISED_STEPS = 4, 100


class _Prepared(Exception):
    """Leaves a call of the pipeline once its latents are there."""

    def __init__(self, latents: Tensor) -> None:
        self.latents = latents


class PipelineCalls:
    """``PipelineCalls`` calls a pipeline for rows that can share a call.

    Args:
        pipe: the pipeline. Its modules stay in place; nothing is wrapped or re-implemented.
        call: extra keyword arguments of the pipeline's call.

    Raises:
        UserError: the pipeline cannot be trained, or ``call`` holds an argument it does not take.
    """

    def __init__(self, pipe: Any, call: Mapping[str, Any] | None = None) -> None:
        self.pipe = pipe
        self.denoisers: dict[str, nn.Module] = denoisers_of(pipe)
        self.call = dict(call or {})
        check_call(pipe, self.call)
        self.parameters = parameters_of(pipe)
        """The parameters of the pipeline's call."""
        self._fixed = fixed_arguments(pipe, self.call)
        self._remembered = remembered_encoding(pipe)
        self._picture_each_row: bool | None = None
        self.sampling: Callable[[], AbstractContextManager[None]] = nullcontext
        """Makes the block in which :meth:`sample` calls the pipeline."""
        self.guidance = Guidance(
            pipe,
            self.denoisers,
            self._fixed,
            lambda t, arguments: self.evaluate(None, t, arguments),
        )
        self._stand_in = probes.stand_in_for(pipe.scheduler)
        self._nominal = _NOISED_STEPS if "strength" in self.parameters else _NOMINAL_STEPS
        self._made: dict[Any, Tensor] = {}
        self._computes: tuple[Any, torch.device] | None = None
        # ``__wrapped__`` is the pipeline's call without its torch.no_grad
        self._call_with_grad: Callable[..., Any] = inspect.unwrap(type(pipe).__call__)
        # a pipeline without weights (dgpo plan) draws its numbers on the CPU
        self._scratch = torch.Generator("cpu" if self.device.type == "meta" else self.device)

    @property
    def device(self) -> torch.device:
        """Return where the denoiser computes."""
        return device_of(next(next(iter(self.denoisers.values())).parameters()))

    def _computing_device(self) -> torch.device:
        """Return where the pipeline says it computes, asked anew where the denoiser was moved or
        hooks that move it have come."""
        denoiser = next(iter(self.denoisers.values()))
        hooks = [id(getattr(denoiser, name, None)) for name in ("_hf_hook", "_diffusers_hook")]
        state = self.device, *hooks
        if self._computes is None or self._computes[0] != state:
            self._computes = state, getattr(self.pipe, "_execution_device", self.device)
        return self._computes[1]

    def arguments(self, cond: Conditioning, guidance_scale: float) -> dict[str, Any]:
        """Return the arguments of one call of the pipeline."""
        guidance = self.guidance.arguments(guidance_scale, cond)
        on = guidance is not self.guidance.off(cond)
        arguments = {**self._fixed, **cond.call_kwargs(on), **guidance}
        shared = row_groups.one_picture(arguments, self.parameters)
        if cond.size == 1 or isinstance(shared.get("image"), list) or "image" not in shared:
            return shared
        # pipelines disagree, and none says which form it takes; it is tried once
        if self._picture_each_row is None:
            two = {**self._fixed, **cond.rows(torch.tensor([0, 1])).call_kwargs(on), **guidance}
            one = row_groups.one_picture(two, self.parameters)
            self._picture_each_row = not self._runs(one, 2) and self._runs(two, 2)
        return arguments if self._picture_each_row else shared

    @contextmanager
    def running(self, arguments: dict[str, Any], **patches: Any) -> Iterator[dict[str, Any]]:
        """Prepare the pipeline for one call: silent, and with some of its parts replaced.

        Args:
            arguments: from :meth:`arguments`.
            patches: attributes of the pipeline for the time of the block.

        Yields:
            The arguments that are left for the call itself.
        """
        # what is replaced is restored even when Evaluated leaves the call from inside the loop
        given, guiders = self.guidance.in_guiders(arguments)
        steady = row_groups.steady_encoding(self.pipe, self.parameters)
        patches = {**self._remembered, **guiders, **patches}
        patched = probes.replaced(self.pipe, _progress_bar_config=_SILENT, **patches)
        with vae_in_its_precision(self.pipe), steady, patched:
            yield given

    def sample(
        self,
        arguments: dict[str, Any],
        steps: int,
        scheduler: Any = None,
        generators: list[torch.Generator] | None = None,
        decode: bool = True,
        record: bool | Container[int] = False,
    ) -> Rollout:
        """Run the pipeline's whole loop once; see :meth:`PipelineModel.rollout`."""
        # a solver keeps past outputs, so no two rollouts share one
        own = fresh(self.pipe.scheduler if scheduler is None else scheduler)
        recording = probes.Recording(keep=record)
        recording.listen(own)
        with (
            self.sampling(),
            self.running(arguments, scheduler=own) as given,
            decoders_watched(self.pipe) as decoded,
            user_code(type(self.pipe).__name__),
        ):
            result = self.pipe(
                **given,
                num_inference_steps=steps,
                generator=generators,
                output_type="pil" if decode else "latent",
                return_dict=False,
            )
        if recording.last is None:
            raise UserError(f"{type(self.pipe).__name__} made no scheduler step")
        decoded.note("the sampler", recording.last)
        images = decoded.samples(result, len(recording.last)) if decode else None
        if images is not None:
            check_size(made_of(images[0]), self.call, type(self.pipe).__name__)
        return Rollout(recording.last, images, recording.levels, recording.steps)

    def evaluate(
        self, xt: Tensor | None, timestep: Tensor, arguments: dict[str, Any], rows: int = 1
    ) -> Tensor:
        """Run the body of the pipeline's loop once, with gradients where they are enabled.

        Args:
            xt: [B, ...], the latents; None for latents of the pipeline's own.
            timestep: what the denoiser is given.
            arguments: from :meth:`arguments`.
            rows: how many latents the pipeline makes if ``xt`` is None.

        Returns:
            [B, ...], what the pipeline hands to ``scheduler.step``.
        """
        stand_in = self._stand_in
        stand_in.point = timestep.detach().reshape(1)
        patches: dict[str, Any] = {"scheduler": stand_in}
        if xt is not None:
            own = self.pipe.prepare_latents
            patches["prepare_latents"] = probes.given_latents(own, xt, self._made)
        known = probes.on_device(self.pipe, self._computing_device())
        try:
            with self.running(arguments, **patches) as given, known:
                self._call_with_grad(
                    self.pipe,
                    **given,
                    num_inference_steps=self._nominal,
                    # a list, as in a rollout: some pipelines take another path without one
                    generator=[self._scratch] * (rows if xt is None else len(xt)),
                    output_type="latent",
                )
        except probes.Evaluated:
            answer, stand_in.answer = stand_in.answer, None  # nobody else may hold its graph
            return answer
        raise UserError(f"{type(self.pipe).__name__} made no scheduler step")

    @torch.no_grad()
    def shape_of(self, arguments: dict[str, Any]) -> tuple[int, ...]:
        """Return the shape of the loop's latents, found without asking the denoiser."""
        prepare = self.pipe.prepare_latents

        def leave(*given: Any, **named: Any) -> Any:
            made = prepare(*given, **named)
            raise _Prepared(made[0] if isinstance(made, tuple) else made)

        try:
            with probes.replaced(self.pipe, prepare_latents=leave):
                self.evaluate(None, middle_timestep(self.pipe.scheduler), arguments)
        except _Prepared as found:
            return tuple(found.latents.shape)
        raise UserError(f"{type(self.pipe).__name__} prepared no latents")

    @torch.no_grad()
    def _runs(self, arguments: dict[str, Any], rows: int) -> bool:
        """Return whether the pipeline can be called with these arguments.

        Some pipelines want a picture for each row; others take every picture that they are given
        for one more picture of the same row.
        """
        try:
            self.evaluate(None, middle_timestep(self.pipe.scheduler), arguments, rows)
        except Exception:  # whatever a call of the wrong form leads to; the other form is tried
            return False
        return True
