"""What an image processor of transformers makes of pictures, made on the device, bit for bit.

A processor resizes with Pillow on the CPU, picture by picture. Pillow computes with whole numbers,
so that the same sums give the same pixels on any device; what follows depends on each pixel alone,
and is a table of 256 numbers a channel. A processor that does something else is asked itself.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dgpo.pictures import Picture, array_of, rgb

_BITS = 22  # Pillow's weights are whole numbers of 2**-22
_PIXELS = "pixel_values"


class Processor:
    """A ``Processor`` is an image processor of transformers whose work is done on the device.

    On a CPU the processor itself is asked: Pillow is faster there.

    Args:
        own: the processor, with Pillow behind it.
    """

    def __init__(self, own: Any) -> None:
        self.own = own
        self._plans: dict[tuple[int, int], _Plan | None] = {}

    def __call__(
        self, images: Sequence[Image.Image], device: torch.device | str
    ) -> dict[str, Tensor]:
        """Return what the processor makes of pictures: tensors by name, on the device."""
        pictures = [rgb(image) for image in images]
        # a size is worth its trial where several pictures have it
        same = len(pictures) > 1 and len({picture.size for picture in pictures}) == 1
        made = None
        if same and torch.device(device).type != "cpu":
            made = self.on_device(pictures, device)
        if made is None:
            made = dict(self.own(pictures, return_tensors="pt").to(device))
        return made

    def on_device(
        self, pictures: Sequence[Image.Image], device: torch.device | str
    ) -> dict[str, Tensor] | None:
        """Return the same, computed on the device; None where the processor does something else.

        Args:
            pictures: RGB, of one size.
            device: where to compute.
        """
        size = pictures[0].size
        if size not in self._plans:
            self._plans[size] = _proved(self.own, size, device)
        plan = self._plans[size]
        return None if plan is None else plan(on(device, pictures))


def on(device: torch.device | str, pictures: Sequence[Image.Image]) -> Tensor:
    """Return RGB pictures of one size on a device: uint8 [B, 3, H, W]."""
    # one by one: what lies in pinned memory travels without a copy on the CPU
    rows = [_pixels(picture).to(device, non_blocking=True) for picture in pictures]
    return torch.stack(rows).permute(0, 3, 1, 2)


def _pixels(picture: Image.Image) -> Tensor:
    waiting = picture.pixels if isinstance(picture, Picture) else None
    return torch.from_numpy(array_of(picture)) if waiting is None else waiting


def resized(pixels: Tensor, size: tuple[int, int], resample: int) -> Tensor:
    """Return pictures as Pillow resizes them, bit for bit.

    Each pixel is a weighted mean of those that the filter reaches, first along the rows and then
    along the columns, in whole numbers of ``2**-22`` that are rounded to 8 bits each time.

    Args:
        pixels: integers [B, 3, H, W] in 0..255.
        size: the new height and width.
        resample: a filter of Pillow that :data:`FILTERS` has.
    """
    made, (height, width) = pixels.to(torch.int32), size
    if made.shape[-1] != width:
        made = _along_rows(made, width, resample)
    if made.shape[-2] != height:
        made = _along_rows(made.transpose(-1, -2), height, resample).transpose(-1, -2)
    return made


def _along_rows(pixels: Tensor, count: int, resample: int) -> Tensor:
    places, weights = _taps(pixels.shape[-1], count, resample, pixels.device)
    sums = pixels.new_full((*pixels.shape[:-1], count), 1 << (_BITS - 1))
    for place, weight in zip(places, weights, strict=True):
        sums += pixels[..., place] * weight
    return (sums >> _BITS).clamp_(0, 255)


@functools.lru_cache(64)
def _taps(size: int, count: int, resample: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The places that each of ``count`` pixels is made of, and their weights: [T, count] each."""
    reach, function = FILTERS[resample]
    scale = size / count
    wide = max(scale, 1.0)  # a picture that shrinks is blurred as well
    reach *= wide
    centre = (np.arange(count) + 0.5) * scale
    first = np.maximum((centre - reach + 0.5).astype(np.int64), 0)
    end = np.minimum((centre + reach + 0.5).astype(np.int64), size)
    places = first + np.arange(2 * math.ceil(reach) + 1)[:, None]
    weights = function(np.abs((places - centre + 0.5) * (1.0 / wide)))
    weights = np.where(places < end, weights, 0.0)
    weights /= weights.cumsum(0)[-1]  # in the order in which Pillow adds
    whole = np.trunc(weights * (1 << _BITS) + np.copysign(0.5, weights)).astype(np.int32)
    inside = np.minimum(places, size - 1)
    return torch.from_numpy(inside).to(device), torch.from_numpy(whole).to(device)


def _triangle(x: np.ndarray) -> np.ndarray:
    return np.where(x < 1, 1 - x, 0.0)


def _cubic(x: np.ndarray) -> np.ndarray:
    """Keys' cubic with a = -1/2."""
    near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


FILTERS: dict[int, tuple[float, Callable[[np.ndarray], np.ndarray]]] = {
    Image.Resampling.BILINEAR: (1.0, _triangle),
    Image.Resampling.BICUBIC: (2.0, _cubic),
}
"""How far each filter reaches, in pixels, and its weight at a distance."""


@dataclass(frozen=True)
class _Plan:
    """What a processor does to pictures of one size."""

    size: tuple[int, int]
    resample: int
    table: Tensor
    """What becomes of each value of each channel: float32 [3, 256]."""
    shape: tuple[int, int]
    """The height and width of what comes out."""
    beside: dict[str, Tensor]
    """The masks of one picture, [1, H, W] each."""

    def __call__(self, pixels: Tensor) -> dict[str, Tensor]:
        made = resized(pixels, self.size, self.resample).long()
        (height, width), (tall, wide) = self.shape, self.size
        top, left = max(tall - height, 0) // 2, max(wide - width, 0) // 2
        made = made[..., top : top + height, left : left + width]
        values = torch.stack([self.table[c][made[:, c]] for c in range(3)], 1)
        below = (0, max(width - wide, 0), 0, max(height - tall, 0))
        masks = {name: mask.expand(len(pixels), -1, -1) for name, mask in self.beside.items()}
        return {_PIXELS: torch.nn.functional.pad(values, below), **masks}


def _proved(own: Any, size: tuple[int, int], device: torch.device | str) -> _Plan | None:
    """What a processor does to pictures of a size (width, height), if a trial confirms it."""
    random = np.random.default_rng(0)
    noise = Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), np.uint8))
    shape, resample = (size[1], size[0]), int(Image.Resampling.BILINEAR)

    def listening(*given: Any, **named: Any) -> Any:
        nonlocal shape, resample
        made = own.resize(*given, **named)
        shape, resample = made.shape[-2:], named.get("resample", -1)
        return made

    def unchanged(image: Any, *_: Any, **__: Any) -> Any:
        return image

    made = _asked(own, noise, resize=listening)
    every = rgb(Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)))
    table = _asked(own, every, resize=unchanged, center_crop=unchanged)[_PIXELS]
    values = made.pop(_PIXELS)
    if resample not in FILTERS or values.ndim != 4 or any(m.ndim != 3 for m in made.values()):
        return None
    plan = _Plan(
        size=shape,
        resample=resample,
        table=table[0, :, :16, :16].reshape(3, 256).to(device),
        shape=(values.shape[-2], values.shape[-1]),
        beside={name: mask.to(device) for name, mask in made.items()},
    )
    return plan if torch.equal(plan(on(device, [noise]))[_PIXELS].cpu(), values) else None


def _asked(own: Any, image: Image.Image, **replaced: Any) -> dict[str, Tensor]:
    """What the processor makes of one picture if some of its methods are others."""
    other = copy.copy(own)
    vars(other).update(replaced)
    return dict(other([image], return_tensors="pt"))
