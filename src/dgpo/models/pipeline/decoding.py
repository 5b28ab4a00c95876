"""The gate between a pipeline's decoders and the rewards: what cannot be judged is a lost sample.

A pipeline makes black pictures of numbers that are not finite, and a safety checker puts black ones
in the place of those that it suspects. Neither may be scored, let alone learned from.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor, nn

from dgpo.errors import UserError
from dgpo.media import Lost, Sound, Video, media_of
from dgpo.models.pipeline.probes import replaced
from dgpo.pictures import Picture


class Decoded:
    """A ``Decoded`` notes which rows of what the parts of a pipeline made are finite."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._finite: list[tuple[str, Tensor]] = []

    def note(self, part: str, made: Any) -> None:
        """Look at what a part returned: a tensor [n, ...], or an output that holds one."""
        tensor = made if isinstance(made, Tensor) else made[0]
        self._finite.append((part, tensor.detach().reshape(len(tensor), -1).isfinite().all(1)))

    def samples(self, result: Sequence[Any], rows: int) -> list[Any]:
        """Return the pictures, videos or sounds of a call, with :class:`~dgpo.media.Lost` for each
        that cannot be judged.

        Args:
            result: what the pipeline's call returned, as a tuple.
            rows: how many the call was asked for.

        Raises:
            UserError: there are not so many, or see :func:`~dgpo.media.media_of`.
        """
        made, kind = media_of(result[0], self._pipe), type(self._pipe).__name__
        if len(made) != rows:
            raise UserError(f"model: {kind} made {len(made)} samples of {rows} rows")
        why: dict[int, str] = {}
        for row, one in enumerate(made):
            if size_of(one) != size_of(made[0]):
                why[row] = f"{kind} made it {size_of(one)}, and others {size_of(made[0])}"
            elif isinstance(one, Sound) and not bool(one.waveform.isfinite().all()):
                why[row] = f"{kind} returned numbers that are not finite"
        flags = result[1] if len(result) > 1 and isinstance(result[1], (list, tuple)) else ()
        flagged = [row for row, flag in enumerate(flags) if flag is True]
        why |= dict.fromkeys(flagged, "a safety checker replaced it")
        for part, finite in self._read():
            # frames of videos may be decoded one by one, row after row
            whole, share = len(finite) % rows == 0, len(finite) // rows
            each = [all(finite[row * share :][:share] if whole else finite) for row in range(rows)]
            bad = [row for row, ok in enumerate(each) if not ok]
            why |= dict.fromkeys(bad, f"{part} returned numbers that are not finite")
        return [Lost(why[row], one) if row in why else one for row, one in enumerate(made)]

    def _read(self) -> list[tuple[str, list[bool]]]:
        """Which rows of each part are finite: the one time that a batch waits for its device."""
        if not self._finite:
            return []
        device = self._finite[-1][1].device
        flags = iter(torch.cat([finite.to(device) for _, finite in self._finite]).tolist())
        return [(part, list(islice(flags, len(finite)))) for part, finite in self._finite]


@contextmanager
def decoders_watched(pipe: Any) -> Iterator[Decoded]:
    """Inside the block the pipeline's decoders are looked at, its safety checker is off, and its
    pictures leave the device as :class:`~dgpo.pictures.Picture`."""
    decoded = Decoded(pipe)
    with ExitStack() as patches:
        if (checker := safety_checker_of(pipe)) is not None:
            warnings.warn(
                f"the safety checker of {type(pipe).__name__} ({type(checker).__name__}) is off: "
                "it would put black pictures in the place of those that it suspects",
                stacklevel=3,
            )
            patches.enter_context(replaced(pipe, safety_checker=None))
        for part in getattr(pipe, "components", {}).values():
            if isinstance(part, nn.Module) and callable(getattr(part, "decode", None)):
                decode = _noted(part, decoded)
                patches.enter_context(replaced(part, decode=decode))
        for part in vars(pipe).values():
            # a class with a postprocess of its own does more than to make pictures of numbers
            if getattr(type(part), "postprocess", None) is VaeImageProcessor.postprocess:
                patches.enter_context(replaced(part, postprocess=_rounded_early(part)))
        yield decoded


def _noted(decoder: Any, decoded: Decoded) -> Any:
    """Return the decoder's ``decode``, which shows what it returns."""
    own = decoder.decode

    def decode(*given: Any, **named: Any) -> Any:
        made = own(*given, **named)
        decoded.note(f"the decoder ({type(decoder).__name__})", made)
        return made

    return decode


def _rounded_early(processor: VaeImageProcessor) -> Any:
    """Return the processor's ``postprocess``, which rounds RGB to 8 bits before it is copied."""
    own: Any = processor.postprocess

    def postprocess(image: Tensor, output_type: str = "pil", *given: Any, **named: Any) -> Any:
        if output_type != "pil" or image.shape[1] != 3:
            return own(image, output_type, *given, **named)
        return pictures_of(own(image, "pt", *given, **named))

    return postprocess


def pictures_of(numbers: Tensor) -> list[Picture]:
    """Return the pictures that diffusers makes of numbers in 0..1, bit for bit.

    From a GPU a quarter of the bytes is copied, and nobody waits for them before they are looked
    at.

    Args:
        numbers: [B, 3, H, W].

    >>> pictures_of(torch.full((1, 3, 2, 2), 0.5))[0].getpixel((0, 0))
    (128, 128, 128)
    """
    pixels = (numbers.float() * 255).round_().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    if not pixels.is_cuda:
        return [Picture(row) for row in pixels.cpu()]
    rows, there = pixels.to("cpu", non_blocking=True), torch.cuda.Event()
    there.record()
    return [Picture(row, there.synchronize) for row in rows]


def safety_checker_of(pipe: Any) -> Any:
    """Return the safety checker that a pipeline can do without, if it has one."""
    # others, such as Cosmos, may not be run without theirs
    return getattr(pipe, "safety_checker", None) if hasattr(pipe, "run_safety_checker") else None


def size_of(made: Any) -> tuple[int, ...]:
    """Return the height and width of a picture, those of a video after its number of frames, or
    the channels and length of a sound."""
    if isinstance(made, Video):
        return tuple(made.frames[:, 0].shape)
    return tuple(made.waveform.shape) if isinstance(made, Sound) else made.size[::-1]
