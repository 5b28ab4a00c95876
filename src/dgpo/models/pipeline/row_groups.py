"""Rows that cannot share a call of the pipeline: a call for each part that can.

Pipelines disagree about a list of different pictures: some take the size of the first for all, some
repeat all of them for every row. And embeddings of different length fit into one tensor only where
a mask says which part of it is padding.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dgpo.errors import UserError
from dgpo.models.pipeline.probes import replaced
from dgpo.models.pipeline.prompt_encoder import Conditioning, Ragged
from dgpo.models.pipeline.rollout import Rollout
from dgpo.prompts.caption import Caption, pictures_of

_ARGUMENTS = {"image": "image", "mask": "mask_image"}


def with_pictures(
    cond: Conditioning, texts: Sequence[str], parameters: Mapping[str, Any]
) -> Conditioning:
    """``cond`` and, where the pipeline's call takes them, the pictures that the texts carry.

    Raises:
        UserError: some of the texts have a picture and some have none.
    """
    pictures = [pictures_of(text) for text in texts]
    added = dict(cond.kwargs)
    for key, argument in _ARGUMENTS.items():
        given = [row[key] for row in pictures if key in row]
        if argument not in parameters or not given:
            continue
        if len(given) < len(pictures):
            raise UserError(
                f"{len(given)} of {len(pictures)} prompt rows have {key!r}: give it to all or none"
            )
        added[argument] = given
    return Conditioning(added, cond.size)


def pictures_for(pipe: Any, texts: Sequence[str]) -> dict[str, Any]:
    """Arguments of a call of the pipeline for the pictures of texts that share them."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    given = with_pictures(Conditioning({}, len(texts)), texts, parameters)
    return {name: value[0] for name, value in given.kwargs.items()}


def parts(cond: Conditioning, one_row: bool = False) -> list[Tensor]:
    """The rows that share their pictures, and the length of their prompts where it matters: [n] for
    each part, together every row once. Rows that are given as text share that, too: beside a longer
    text they would be padded. With ``one_row`` every row is a part."""
    if one_row:
        return list(torch.arange(cond.size).split(1))
    lists = [cond.kwargs[name] for name in _ARGUMENTS.values() if name in cond.kwargs]
    ragged = [value for value in cond.kwargs.values() if isinstance(value, Ragged)]
    texts = cond.kwargs.get("prompt") or [""] * cond.size
    found: dict[tuple[Any, ...], list[int]] = {}
    for row in range(cond.size):
        shapes = (given[row].shape for given in ragged)
        shared = (texts[row], *(id(given[row]) for given in lists), *shapes)
        found.setdefault(shared, []).append(row)
    return [torch.tensor(rows) for rows in found.values()]


def one_picture(arguments: dict[str, Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call whose rows share their pictures: given once, but to a pipeline that
    noises its picture (it has a ``strength``) once for each row, as each is noised on its own."""
    if "strength" in parameters:
        return arguments
    shared = {n: arguments[n][0] for n in _ARGUMENTS.values() if isinstance(arguments.get(n), list)}
    return {**arguments, **shared}


def check_sizes(texts: Sequence[str], shape_of: Callable[[str], tuple[int, ...]]) -> None:
    """See that pictures of different size lead to samples of one size, as a batch needs it; one
    picture of every size is tried.

    Args:
        texts: of all prompt rows.
        shape_of: the shape of the sample that one of them leads to.

    Raises:
        UserError: they do not.
    """
    first: dict[tuple[int, int], str] = {}
    for text in texts:
        if isinstance(text, Caption) and "image" in text.files:
            first.setdefault(text.size_of("image"), text)
    if len(first) < 2:
        return
    (one, text), *others = first.items()
    shape = shape_of(text)
    for other, text in others:
        if shape_of(text) != shape:
            raise UserError(
                f"prompts: a picture of {one[0]} x {one[1]} pixels and one of {other[0]} x "
                f"{other[1]} lead to samples of different size: set rollout.call.height and width, "
                "or give pictures of one size"
            )


@contextmanager
def steady_encoding(pipe: Any, parameters: Mapping[str, Any]) -> Iterator[None]:
    """Inside the block a pipeline that looks at a picture at every step, to edit it, to set it
    moving or to paint in a mask, sees it the same at every call: as the mode of the VAE's
    distribution, of which it would draw. Random numbers are drawn as ever. (One that noises its
    picture and looks at it no more keeps its draw.)"""
    looks = {"mask_image", "control_image"} & set(parameters)
    looks = looks or ("image" in parameters and "strength" not in parameters)
    own = getattr(getattr(pipe, "vae", None), "encode", None)
    if own is None or not looks:
        yield
        return

    def encode(*given: Any, **named: Any) -> Any:
        made = own(*given, **named)
        spread = getattr(made, "latent_dist", None)
        if spread is not None:
            draw = spread.sample

            def mode(generator: Any = None) -> Tensor:
                draw(generator)
                return spread.mode()

            spread.sample = mode
        return made

    with replaced(pipe.vae, encode=encode):
        yield


def for_rows(scheduler: Any, rows: Tensor) -> Any:
    """The sampler for some rows: one that adds noise has a seed for each (and refuses to run with
    too few)."""
    seeds = getattr(scheduler, "seeds", ())
    if len(seeds) <= int(rows.max()):
        return scheduler
    made = copy.copy(scheduler)
    made.seeds = [seeds[row] for row in rows.tolist()]
    return made


def in_order(made: Sequence[Tensor], rows: Sequence[Tensor]) -> Tensor:
    """What was made of the parts, row by row as they were before.

    Raises:
        UserError: parts of different size.
    """
    if len({tuple(part.shape[1:]) for part in made}) > 1:
        raise UserError(
            "the pictures of these prompts lead to samples of different size: set height and "
            "width in rollout.call, or give pictures of one size"
        )
    return torch.cat(list(made))[torch.cat(list(rows)).argsort()]


def joined(made: Sequence[Rollout], rows: Sequence[Tensor]) -> Rollout:
    """The rollouts of parts as one, row by row as they were before."""
    first = made[0]
    if len(made) == 1:
        return first
    x0 = in_order([part.x0 for part in made], rows)
    schedules = {tuple((float(v.timestep), v.sigma) for v in part.levels) for part in made}
    if len(schedules) > 1:
        raise UserError(
            "the pictures of these prompts lead to different noise levels: give one size"
        )
    order = torch.cat(list(rows)).argsort().tolist()
    images = None
    if first.images is not None:
        together = [image for part in made for image in part.images or []]
        images = [together[row] for row in order]
    tensors = ("sample", "output", "previous")
    steps = [
        replace(same[0], **{n: in_order([getattr(s, n) for s in same], rows) for n in tensors})
        for same in zip(*(part.steps for part in made), strict=True)
    ]
    return type(first)(x0, images, first.levels, steps)
