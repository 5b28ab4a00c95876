"""Classifier-free guidance of a pipeline; how it is switched off is found out by trying."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from dgpo.errors import UserError
from dgpo.models.pipeline import row_groups
from dgpo.models.pipeline.arguments import (
    GUIDER,
    guidance_off_candidates,
    guiders_of,
    needs_picture,
    no_picture,
    parameters_of,
)
from dgpo.models.pipeline.families import family_of
from dgpo.models.pipeline.prompt_encoder import Conditioning
from dgpo.models.samplers.schedulers import middle_timestep

Evaluate = Callable[[torch.Tensor, dict[str, Any]], Any]
"""One pass of the pipeline's loop body at a timestep, with the arguments of its call."""


class Guidance:
    """``Guidance`` finds the arguments of a pipeline's call that set its guidance.

    Args:
        pipe: the pipeline.
        denoisers: its networks, whose calls are counted.
        fixed: the arguments of every call.
        evaluate: runs the pipeline at one point.
    """

    def __init__(
        self,
        pipe: Any,
        denoisers: Mapping[str, nn.Module],
        fixed: Mapping[str, Any],
        evaluate: Evaluate,
    ) -> None:
        self._pipe, self._denoisers, self._fixed = pipe, denoisers, dict(fixed)
        self._evaluate = evaluate
        self._parameters = parameters_of(pipe)
        self._off: dict[str, Any] | None = None
        self._guiders: dict[float, dict[str, Any]] = {}
        alone = all(map(_guides_each_step_alone, guiders_of(pipe).values()))
        self._trainable = family_of(pipe).guidance and alone

    def exists(self, cond: Conditioning) -> bool:
        """Return whether guidance can be switched on for this conditioning."""
        possible = cond.guided or "negative_prompt_embeds" not in self._parameters
        return possible and self._trainable and bool(self.off(cond))

    def arguments(self, scale: float, cond: Conditioning) -> dict[str, Any]:
        """Return the arguments that set a scale; 1 is no guidance.

        Raises:
            UserError: the pipeline has no guidance, or the negative prompt is missing.
        """
        if scale != 1.0 and not self._trainable:
            raise UserError(
                f"guidance_scale={scale}: the guidance of {type(self._pipe).__name__} remembers "
                "or counts earlier steps (or has no single scale), so that no single step can be "
                "trained with it; use 1.0"
            )
        off = self.off(cond)
        # where guidance is off at 0, a scale of 0 means off, too
        if scale == 1.0 or scale in off.values():
            return off
        if not off:
            raise UserError(
                f"guidance_scale={scale}: {type(self._pipe).__name__} has no classifier-free "
                "guidance; use 1.0 (an embedded guidance is rollout.call.guidance_scale)"
            )
        if "negative_prompt_embeds" in self._parameters and not cond.guided:
            raise UserError(f"guidance_scale={scale} needs prompts encoded with guidance=True")
        return dict.fromkeys(off, scale)

    def off(self, cond: Conditioning) -> dict[str, Any]:
        """Return the arguments that switch guidance off, found at the first call."""
        if self._off is None:
            self._off = self._find(cond.rows(torch.tensor([0])))
        return self._off

    def in_guiders(self, arguments: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Take the scale of guiders out of the arguments of a call.

        Returns:
            The other arguments, and the pipeline's guiders with that scale, by name. A scale of 1
            switches them off, whatever it is that they do.
        """
        if GUIDER not in arguments:
            return arguments, {}
        scale = arguments[GUIDER]
        # a guider of our own for each scale: the pipeline's stays as the user has set it
        if scale not in self._guiders:
            change = {"enabled": False} if scale == 1.0 else {"guidance_scale": scale}
            guiders = guiders_of(self._pipe).items()
            self._guiders[scale] = {name: guider.new(**change) for name, guider in guiders}
        return {n: v for n, v in arguments.items() if n != GUIDER}, self._guiders[scale]

    def _find(self, one_row: Conditioning) -> dict[str, Any]:
        """Return the first candidate with which a step calls the denoiser once, with one row."""
        embeddings = dict(one_row.kwargs)
        for name, value in one_row.kwargs.items():
            if f"negative_{name}" in self._parameters:
                # so that a candidate that leaves guidance on gets as far as the denoiser
                embeddings.setdefault(f"negative_{name}", value)
        if needs_picture(self._pipe) and "image" not in embeddings:
            raise no_picture(self._pipe)
        for candidate in guidance_off_candidates(self._pipe):
            arguments = {**self._fixed, **embeddings, **candidate}
            if self._tried(row_groups.one_picture(arguments, self._parameters)) == [1]:
                return candidate
        raise UserError(f"model: cannot switch guidance off in {type(self._pipe).__name__}")

    def _tried(self, arguments: dict[str, Any]) -> list[int]:
        """:meth:`_rows`, with an error for the user where the pipeline refuses its first call."""
        meta = any(p.is_meta for d in self._denoisers.values() for p in d.parameters())
        # without weights (dgpo plan) a tensor raises RuntimeError when its numbers are looked at
        refusals = (ValueError,) if meta else (ValueError, RuntimeError)
        try:
            return self._rows(arguments)
        except UserError:
            raise
        except refusals as error:
            given = {n: v for n, v in self._fixed.items() if isinstance(v, (int, float, str))}
            shown = ", ".join(f"{name}={value}" for name, value in given.items())
            raise UserError(
                f"rollout.call: {type(self._pipe).__name__} cannot be called with {shown}: "
                f"{str(error).partition(chr(10))[0][:300]}"
            ) from error

    @torch.no_grad()
    def _rows(self, arguments: dict[str, Any]) -> list[int]:
        """Return the batch size of each denoiser call in one step."""
        rows: list[int] = []

        def count(module: nn.Module, inputs: Any, output: Any) -> None:
            rows.append(len(output[0]))

        with ExitStack() as hooks:
            for denoiser in self._denoisers.values():
                hooks.enter_context(denoiser.register_forward_hook(count))
            self._evaluate(middle_timestep(self._pipe.scheduler), arguments)
        return rows


def _guides_each_step_alone(guider: Any) -> bool:
    """Return whether a guider has a scale, and depends neither on earlier steps nor on their
    number."""
    if "guidance_scale" not in guider.config:
        return False
    for key, value in guider.config.items():
        counts = "momentum" in key or "_step" in key or key.endswith("start")
        if (counts and value) or (key.endswith("stop") and value != 1.0):
            return False
    return True
