"""The command `dgpo sample`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from dgpo.cli.checks import check_folder, check_lora, prompt_rows
from dgpo.cli.options import Batch, Device, Lora, Model, Precision, VaePrecision
from dgpo.errors import UserError
from dgpo.recipe.files import apply_overrides
from dgpo.recipe.sections import SampleSettings
from dgpo.registry import MODELS

Sampler = Callable[[Sequence[str], Sequence[int]], Any]
"""Takes texts and a seed for each, and returns what the pipeline made of them."""
_SEED = "Row i gets seed S + i."
_GUIDANCE = "As rollout.guidance_scale; 1: no guidance. Default: the pipeline's own arguments."
_CALL = "Another argument of the pipeline's call, as rollout.call; may be repeated."
_PROMPT = "A prompt; may be repeated."
_PROMPTS = ".txt, .jsonl, or a built-in set."
_STEPS = "Sampling steps. Default: the pipeline's."


def _finite(value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


def sample(
    model: Model,
    out: Annotated[Path, Option(metavar="DIR", help="The folder of the files.")],
    prompt: Annotated[list[str] | None, Option(metavar="TEXT", help=_PROMPT)] = None,
    more: Annotated[list[str] | None, Argument(metavar="TEXT", hidden=True)] = None,
    prompts: Annotated[str | None, Option(metavar="FILE", help=_PROMPTS)] = None,
    lora: Lora = None,
    steps: Annotated[int | None, Option(min=1, metavar="N", help=_STEPS)] = None,
    guidance_scale: Annotated[
        float | None, Option(min=0, metavar="G", callback=_finite, help=_GUIDANCE)
    ] = None,
    seed: Annotated[int, Option(min=0, max=2**63 - 1, metavar="S", help=_SEED)] = 0,
    height: Annotated[int | None, Option(min=1, metavar="PX", help="In pixels.")] = None,
    width: Annotated[int | None, Option(min=1, metavar="PX", help="In pixels.")] = None,
    call: Annotated[list[str] | None, Option(metavar="KEY=VALUE", help=_CALL)] = None,
    batch: Batch = 8,
    precision: Precision = "float32",
    vae_precision: VaePrecision = None,
    device: Device = None,
) -> None:
    """Make one picture, video or sound of each prompt: DIR/00000.png (mp4, wav), 00001.png, ..."""
    rows = prompt_rows(prompt or [], more or [], prompts)
    check_folder("--out", out)
    check_lora(lora)
    given: dict[str, Any] = dict(MODELS[model].call) if model in MODELS else {}
    given |= {key: value for key, value in (("height", height), ("width", width)) if value}
    given |= apply_overrides({}, call or [])
    from dgpo.media import save_media
    from dgpo.models.load import load_for_sampling

    pipe = load_for_sampling(
        model, precision, lora=lora, device=device, vae_precision=vae_precision
    )
    if guidance_scale is not None:
        make = _guided(pipe, given, steps, guidance_scale)
    else:
        own = given if steps is None else {**given, "num_inference_steps": steps}
        make = partial(_called, pipe, own)
    how, done, written = SampleSettings(), 0, 0
    for texts in _batches([row.text for row in rows], batch):
        seeds = range(seed + done, seed + done + len(texts))
        made = make(texts, seeds)
        written += len(save_media(made, out, how.video, how.fps, first=done))
        done += len(made)
    print(f"{written} pictures in {out}")


def _batches(texts: Sequence[str], size: int) -> list[Sequence[str]]:
    """Split texts into those of one call; a text that starts from a picture gets its own."""
    from dgpo.prompts.caption import pictures_of

    if any(pictures_of(text) for text in texts):
        size = 1
    return [texts[start : start + size] for start in range(0, len(texts), size)]


def _generators(seeds: Sequence[int]) -> list[Any]:
    """Make a generator for each row, so that no picture depends on the batch it was made in."""
    import torch

    return [torch.Generator().manual_seed(seed) for seed in seeds]


def _guided(pipe: Any, call: Mapping[str, Any], steps: int | None, scale: float) -> Sampler:
    """Sample as rollouts do, which find out which argument of the pipeline is its guidance and
    whether it needs a negative prompt."""
    from dgpo.models import PipelineModel

    model = PipelineModel(pipe, call=call)
    if steps is None:
        steps = int(model.parameters["num_inference_steps"].default)

    def make(texts: Sequence[str], seeds: Sequence[int]) -> Any:
        with _told(pipe, call):
            cond = model.encode(list(texts), guidance=scale != 1)
            made = model.rollout(
                cond, steps=steps, guidance_scale=scale, generators=_generators(seeds)
            )
        return made.images

    return make


def _called(pipe: Any, call: Mapping[str, Any], texts: Sequence[str], seeds: Sequence[int]) -> Any:
    """Sample by a plain call of the pipeline."""
    from dgpo.models.pipeline.decoding import decoders_watched
    from dgpo.models.pipeline.row_groups import pictures_for
    from dgpo.models.pipeline.vae_precision import vae_in_its_precision

    pictures = pictures_for(pipe, texts)
    given = {"prompt": list(texts), "generator": _generators(seeds), "return_dict": False}
    with _told(pipe, call), vae_in_its_precision(pipe), decoders_watched(pipe) as decoded:
        return decoded.samples(pipe(**given, **pictures, **call), len(texts))


@contextmanager
def _told(pipe: Any, call: Mapping[str, Any]) -> Iterator[None]:
    """Turn a pipeline's objection to its arguments into one error that names them."""
    try:
        yield
    except (TypeError, ValueError) as error:  # how pipelines refuse arguments
        asked = ", ".join(f"{key}={value}" for key, value in call.items()) or "its defaults"
        raise UserError(f"{type(pipe).__name__} cannot sample with {asked}: {error}") from error
