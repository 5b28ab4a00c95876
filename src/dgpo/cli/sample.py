"""`dgpo sample`: pictures, videos or sounds of prompts, as files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from dgpo.cli.common import (
    Device,
    Lora,
    Model,
    Precision,
    VaePrecision,
    check_folder,
    prompt_rows,
)
from dgpo.errors import UserError
from dgpo.recipe.files import apply_overrides
from dgpo.recipe.sections import SampleSettings

Sampler = Callable[[Sequence[str], Sequence[int]], Any]
"""Texts and a seed for each to what was made of them."""


def _finite(value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


def sample(
    model: Model,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where pictures go.")],
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", metavar="TEXT", help="May be repeated.")
    ] = None,
    more: Annotated[list[str] | None, typer.Argument(metavar="TEXT", hidden=True)] = None,
    prompts: Annotated[
        str | None,
        typer.Option("--prompts", metavar="FILE", help=".txt, .jsonl, or a built-in set."),
    ] = None,
    lora: Lora = None,
    steps: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Default: the pipeline's.")
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="G",
            callback=_finite,
            help="Classifier-free guidance, as rollout.guidance_scale; 1: none. Default: the "
            "pipeline's own arguments.",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, metavar="S", help="Row i gets seed S + i.")
    ] = 0,
    height: Annotated[int | None, typer.Option(min=1, metavar="PX", help="In pixels.")] = None,
    width: Annotated[int | None, typer.Option(min=1, metavar="PX", help="In pixels.")] = None,
    call: Annotated[
        list[str] | None,
        typer.Option(
            "--call",
            metavar="KEY=VALUE",
            help="Another argument of the pipeline's call, as rollout.call; may be repeated.",
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Pictures made at once.")] = 8,
    precision: Precision = "float32",
    vae_precision: VaePrecision = None,
    device: Device = None,
) -> None:
    """Make one picture, video or sound of each prompt: DIR/00000.png (mp4, wav), 00001.png, ..."""
    rows = prompt_rows(prompt or [], more or [], prompts)
    check_folder("--out", out)
    size = {"height": height, "width": width}
    given = {
        **{key: value for key, value in size.items() if value},
        **apply_overrides({}, call or []),
    }
    from dgpo.models.load import load_for_sampling

    pipe = load_for_sampling(
        model, precision, lora=lora, device=device, vae_precision=vae_precision
    )
    if guidance_scale is not None:
        make = _guided(pipe, given, steps, guidance_scale)
    else:
        own = given if steps is None else {**given, "num_inference_steps": steps}
        make = partial(_called, pipe, own)
    from dgpo.media import save_media

    how, done = SampleSettings(), 0
    for texts in _batches([row.text for row in rows], batch):
        seeds = range(seed + done, seed + done + len(texts))
        made = make(texts, seeds)
        done += len(save_media(made, out, how.video, how.fps, first=done))
    typer.echo(f"{done} pictures in {out}")


def _batches(texts: Sequence[str], size: int) -> list[Sequence[str]]:
    """Texts that are sampled in one call; those that start from a picture have one each."""
    from dgpo.prompts.caption import pictures_of

    if any(pictures_of(text) for text in texts):
        size = 1
    return [texts[start : start + size] for start in range(0, len(texts), size)]


def _generators(seeds: Sequence[int]) -> list[Any]:
    """One a row: a picture does not depend on the batch it was made in."""
    import torch

    return [torch.Generator().manual_seed(seed) for seed in seeds]


def _guided(pipe: Any, call: Mapping[str, Any], steps: int | None, scale: float) -> Sampler:
    """Pictures as rollouts make them: which argument of the pipeline is its guidance, and whether
    that needs a negative prompt, is found out."""
    from dgpo.models import PipelineModel

    model = PipelineModel(pipe, call=call)
    if steps is None:
        steps = int(model.parameters["num_inference_steps"].default)

    def make(texts: Sequence[str], seeds: Sequence[int]) -> Any:
        with _said(pipe, call):
            cond = model.encode(list(texts), guidance=scale != 1)
            made = model.rollout(
                cond, steps=steps, guidance_scale=scale, generators=_generators(seeds)
            )
        return made.images

    return make


def _called(pipe: Any, call: Mapping[str, Any], texts: Sequence[str], seeds: Sequence[int]) -> Any:
    from dgpo.media import media_of
    from dgpo.models.pipeline.row_groups import pictures_for
    from dgpo.models.pipeline.vae_precision import vae_in_its_precision

    pictures = pictures_for(pipe, texts)
    given = {"prompt": list(texts), "generator": _generators(seeds), "return_dict": False}
    with _said(pipe, call), vae_in_its_precision(pipe):
        return media_of(pipe(**given, **pictures, **call)[0], pipe)


@contextmanager
def _said(pipe: Any, call: Mapping[str, Any]) -> Iterator[None]:
    """What a pipeline has against its arguments as one error that names them."""
    try:
        yield
    except (TypeError, ValueError) as error:  # how pipelines refuse arguments
        asked = ", ".join(f"{key}={value}" for key, value in call.items()) or "its defaults"
        raise UserError(f"{type(pipe).__name__} cannot sample with {asked}: {error}") from error
