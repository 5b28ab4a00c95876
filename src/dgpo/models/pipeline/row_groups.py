"""Rows that cannot share a call of the pipeline are parted into groups that can.

Pipelines disagree about a list of different pictures: some take the size of the first for all, some
repeat all of them for every row. And embeddings of different length fit into one tensor only where
a mask says what is padding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dgpo.errors import UserError
from dgpo.models.pipeline.arguments import parameters_of
from dgpo.models.pipeline.probes import replaced
from dgpo.models.pipeline.prompt_encoder import Conditioning, Ragged
from dgpo.models.pipeline.rollout import Rollout
from dgpo.prompts.caption import Caption, pictures_of

_ARGUMENTS = {"image": "image", "mask": "mask_image"}


def with_pictures(
    cond: Conditioning, texts: Sequence[str], parameters: Mapping[str, Any]
) -> Conditioning:
    """Add the pictures that the texts carry to ``cond``, where the pipeline's call takes them.

    Raises:
        UserError: only some of the texts have a picture.
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
    """Return the arguments of a call of the pipeline for the pictures that all texts share."""
    given = with_pictures(Conditioning({}, len(texts)), texts, parameters_of(pipe))
    return {name: value[0] for name, value in given.kwargs.items()}


def parts(cond: Conditioning, one_row: bool = False) -> list[Tensor]:
    """Return the rows that can share a call: [n] for each part, in which every row is once.

    Rows of a part share their pictures, and the length of their prompts where it matters. Rows that
    are given as text share the text: beside a longer one they would be padded.

    Args:
        cond: the conditioning of all rows.
        one_row: whether every row needs a call of its own.
    """
    if one_row:
        return list(torch.arange(cond.size).split(1))
    lists = [cond.kwargs[name] for name in _ARGUMENTS.values() if name in cond.kwargs]
    ragged = [value for value in cond.kwargs.values() if isinstance(value, Ragged)]
    texts = cond.kwargs.get("prompt") or [""] * cond.size
    found: dict[tuple[Any, ...], list[int]] = {}
    for row in range(cond.size):
        shapes = (given[row].shape for given in ragged)
        # by identity: the members of a group hold one picture, and comparing pixels is slow
        shared = (texts[row], *(id(given[row]) for given in lists), *shapes)
        found.setdefault(shared, []).append(row)
    return [torch.tensor(rows) for rows in found.values()]


def one_picture(arguments: dict[str, Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call whose rows share their pictures: each picture is given once.

    A pipeline that noises its picture (it has a ``strength``) is given one for each row, because it
    noises each on its own.
    """
    if "strength" in parameters:
        return arguments
    shared = {n: arguments[n][0] for n in _ARGUMENTS.values() if isinstance(arguments.get(n), list)}
    return {**arguments, **shared}


def check_sizes(texts: Sequence[str], shape_of: Callable[[str], tuple[int, ...]]) -> None:
    """Refuse pictures that lead to samples of different size, which no batch can hold.

    One picture of every size is tried.

    Args:
        texts: the texts of all prompt rows.
        shape_of: gives the shape of the sample that a text leads to.

    Raises:
        UserError: the shapes differ.
    """
    first: dict[tuple[int, int], str] = {}
    for text in texts:
        if isinstance(text, Caption) and "image" in text.files:
            first.setdefault(text.size_of("image"), text)
    if len(first) < 2:
        return
    # the size of a picture decides, so one of each size is enough
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
    """Inside the block every call of the pipeline sees its picture in the same way.

    A pipeline that edits a picture, animates it or paints in a mask looks at it at every step. It
    would draw the latent from the VAE's distribution at each call, and a training pass would see
    another picture than the rollout; it is given the mode instead. Random numbers are drawn as
    before, so that those that follow stay the same. A pipeline that noises its picture and then
    looks no more at it keeps its draw.
    """
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
                draw(generator)  # moves the generator on
                return spread.mode()

            spread.sample = mode
        return made

    with replaced(pipe.vae, encode=encode):
        yield


def for_rows(scheduler: Any, rows: Tensor) -> Any:
    """Return the sampler for some of the rows.

    One that adds noise holds a seed for each row; with too few it is left as it is, and refuses to
    run.
    """
    seeds = getattr(scheduler, "seeds", ())
    if len(seeds) <= int(rows.max()):
        return scheduler
    made = copy.copy(scheduler)
    made.seeds = [seeds[row] for row in rows.tolist()]
    return made


def in_order(made: Sequence[Tensor], rows: Sequence[Tensor]) -> Tensor:
    """Put together what was made of the parts, in the order of the rows.

    Raises:
        UserError: the parts have different sizes.
    """
    if len({tuple(part.shape[1:]) for part in made}) > 1:
        raise UserError(
            "the pictures of these prompts lead to samples of different size: set height and "
            "width in rollout.call, or give pictures of one size"
        )
    return torch.cat(list(made))[torch.cat(list(rows)).argsort()]


def joined(made: Sequence[Rollout], rows: Sequence[Tensor]) -> Rollout:
    """Put the rollouts of parts together, in the order of the rows.

    Raises:
        UserError: the parts have different sizes or noise levels.
    """
    first = made[0]
    if len(made) == 1:
        return first
    x0 = in_order([part.x0 for part in made], rows)
    # some pipelines shift their schedule by the size of the sample
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
    return Rollout(x0, images, first.levels, steps)
