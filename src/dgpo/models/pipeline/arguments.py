"""The keyword arguments of a pipeline's call: which are dgpo's, which the user may set, and which
may switch guidance off."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

from diffusers.guiders import BaseGuidance
from torch import nn

from dgpo.errors import UserError
from dgpo.media import Video
from dgpo.models.pipeline.families import family_of
from dgpo.models.weights.lora_names import DENOISERS
from dgpo.reserved import RESERVED, refusal

GUIDER = "guider"
"""The name, among the arguments of a call, of the scale of the pipeline's guiders."""
_PER_PROMPT = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")
_NOT_FOR_USERS = {"kwargs", "device", "dtype", "do_classifier_free_guidance"}


def denoisers_of(pipe: Any) -> dict[str, nn.Module]:
    """Return the networks that a pipeline calls at every step, by the name of their component.

    Raises:
        UserError: the pipeline has none, or lacks a method that sampling and training need.
    """
    found = {name: getattr(pipe, name, None) for name in DENOISERS}
    denoisers = {name: m for name, m in found.items() if isinstance(m, nn.Module)}
    missing = [n for n in ("encode_prompt", "prepare_latents") if not hasattr(pipe, n)]
    refusal = family_of(pipe).refusal
    if not denoisers:
        refusal = f"it has none of {', '.join(DENOISERS)}"
    elif missing:
        refusal = f"it has no {' and no '.join(missing)}"
    elif not {"prompt", "output_type"} <= set(parameters_of(pipe)):
        refusal = "its call takes no prompt or no output_type"
    if refusal is not None:
        raise UserError(f"model: cannot train {type(pipe).__name__}: {refusal}")
    return denoisers


def parameters_of(pipe: Any) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of the pipeline's call."""
    return inspect.signature(type(pipe).__call__).parameters


def needs_picture(pipe: Any) -> bool:
    """Return whether the pipeline cannot do without a picture, because its call requires one, or
    noises it and samples from it. (FLUX.2 and Kontext take a picture and can do without.)"""
    parameters = parameters_of(pipe)
    if "image" not in parameters:
        return False
    return parameters["image"].default is inspect.Parameter.empty or "strength" in parameters


def no_picture(pipe: Any) -> UserError:
    """Return the error of a prompt row without the picture that the pipeline needs."""
    return UserError(
        f"model: {type(pipe).__name__} starts from a picture: give every prompt row 'image', a "
        "file (for dgpo check: --image FILE)"
    )


def check_call(pipe: Any, call: Mapping[str, Any]) -> None:
    """Refuse arguments that dgpo sets itself, and arguments that the pipeline does not take.

    Raises:
        UserError: with the key, and the nearest name that the pipeline takes.
    """
    encode = inspect.signature(type(pipe).encode_prompt).parameters
    valid = sorted({*parameters_of(pipe), *encode} - set(RESERVED) - _NOT_FOR_USERS)
    if _guidance_is_an_input(pipe):
        valid.append("guidance_scale")
    for name, value in call.items():
        if name in valid:
            default = getattr(parameters_of(pipe).get(name), "default", None)
            if isinstance(default, bool) and isinstance(value, str):
                raise UserError(f"rollout.call.{name} = {value!r}: write true or false")
            continue
        if name in RESERVED:
            raise UserError(refusal(name))
        nearest = difflib.get_close_matches(name, valid, n=1)
        hint = f" (did you mean {nearest[0]}?)" if nearest else f"; it takes {', '.join(valid)}"
        raise UserError(f"rollout.call.{name}: {type(pipe).__name__} takes no such argument{hint}")


def check_size(made: Any, call: Mapping[str, Any], pipeline: str) -> None:
    """Refuse a picture or video of another size than was asked for: some pipelines round it.

    Raises:
        UserError: the size differs.
    """
    size = (
        made.frames.shape[-2:] if isinstance(made, Video) else getattr(made, "size", (0, 0))[::-1]
    )
    for name, got in zip(("height", "width"), size, strict=True):
        if got and call.get(name) not in (None, got):
            raise UserError(
                f"rollout.call.{name} = {call[name]}: {pipeline} makes {got} of it; use {got}, or "
                "another number that it can make"
            )


def fixed_arguments(pipe: Any, call: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of every call of the pipeline, whatever the prompts and the guidance."""
    parameters = parameters_of(pipe)
    fixed = {
        name: value
        for name, value in call.items()
        # the negative prompt reaches the call as an embedding
        if name in parameters and not name.startswith("negative_prompt")
    }
    for name in _PER_PROMPT:
        if name in parameters:
            # dgpo expands rows: with given embeddings many pipelines expand them wrongly
            fixed[name] = 1
    for name in ("prompt", "negative_prompt"):
        if name in parameters and parameters[name].default is not None:
            fixed[name] = None  # some pipelines refuse a text beside its embedding
    return fixed


def guidance_off_candidates(pipe: Any) -> list[dict[str, Any]]:
    """Return arguments that may switch guidance off, the likeliest first; a probe decides between
    them.

    ``guidance_scale`` means three things among pipelines: classifier-free guidance that is off at
    1; the same, off at 0; or an input of a distilled denoiser, whose guidance is
    ``true_cfg_scale``. A pipeline with guiders takes no scale: the guiders have it, and it is
    called :data:`GUIDER` here.
    """
    if guiders_of(pipe):
        return [{GUIDER: 1.0}]
    parameters = parameters_of(pipe)
    candidates: list[dict[str, Any]] = []
    if "true_cfg_scale" in parameters:
        candidates.append({"true_cfg_scale": 1.0})
    elif _guidance_is_an_input(pipe):
        candidates.append({})
    if "guidance_scale" in parameters:
        candidates += [{"guidance_scale": 1.0}, {"guidance_scale": 0.0}]
    return [*candidates, {}]


def guiders_of(pipe: Any) -> dict[str, Any]:
    """Return the components of a pipeline that hold its guidance, by name (HunyuanVideo 1.5,
    Motif)."""
    parts = getattr(pipe, "components", {})
    return {n: part for n, part in parts.items() if isinstance(part, BaseGuidance)}


def _guidance_is_an_input(pipe: Any) -> bool:
    denoisers = (getattr(pipe, name, None) for name in DENOISERS)
    return any(getattr(getattr(d, "config", None), "guidance_embeds", False) for d in denoisers)
