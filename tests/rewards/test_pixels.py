"""What processors make of pictures is made on the device with the same bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    DetrImageProcessorPil,
    Mask2FormerImageProcessorPil,
    RTDetrImageProcessorPil,
    YolosImageProcessorPil,
)

from dgpo.pictures import Picture
from dgpo.rewards.pixels import FILTERS, Processor, on, resized
from rewards.tiny import pictures

NAMES = {
    "clip": CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32),
    "clip, whole": CLIPImageProcessorPil(size={"height": 20, "width": 30}, do_center_crop=False),
    "detr": DetrImageProcessorPil(size={"shortest_edge": 40, "longest_edge": 60}),
    "yolos, padded": YolosImageProcessorPil(
        size={"shortest_edge": 40, "longest_edge": 60}, pad_size={"height": 64, "width": 72}
    ),
    "rt-detr": RTDetrImageProcessorPil(size={"height": 48, "width": 48}),
    "mask2former": Mask2FormerImageProcessorPil(
        size={"shortest_edge": 40, "longest_edge": 60}, size_divisor=32
    ),
    "as it is": CLIPImageProcessorPil(do_resize=False, do_center_crop=False),
}  # fmt: skip


def test_resizing_is_pillows_bit_for_bit() -> None:
    random = np.random.default_rng(0)
    for resample in FILTERS:
        for size, new in [
            ((64, 48), (32, 32)), ((33, 47), (224, 224)), ((50, 50), (50, 20)), ((9, 8), (9, 8)),
            ((5, 3), (1, 1)), ((1, 1), (4, 5)), ((512, 512), (224, 224)), ((40, 31), (39, 32)),
        ]:  # fmt: skip
            steep = random.integers(0, 2, (size[1], size[0], 3), np.uint8) * 255
            noise = random.integers(0, 256, (size[1], size[0], 3), np.uint8)
            for image in map(Image.fromarray, (steep, noise)):
                got = resized(on("cpu", [image, image]), new[::-1], resample)
                want = torch.from_numpy(np.asarray(image.resize(new, resample)).copy())
                assert torch.equal(got[1], want.permute(2, 0, 1).int()), (resample, size, new)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(40, 48), (64, 64), (61, 35)])
def test_processors_are_matched_bit_for_bit(name: str, size: tuple[int, int]) -> None:
    own, images = NAMES[name], pictures(3, size)
    want = dict(own(images, return_tensors="pt"))
    got = Processor(own).on_device(images, "cpu")
    assert got is not None and got.keys() == want.keys()
    for key, value in want.items():
        assert torch.equal(got[key], value) and got[key].dtype == value.dtype, key


def test_what_is_done_otherwise_is_left_to_the_processor() -> None:
    class Mirrors(CLIPImageProcessorPil):
        def resize(self, image: Any, *given: Any, **named: Any) -> Any:
            return super().resize(image, *given, **named)[..., ::-1]

    lanczos = CLIPImageProcessorPil(resample=Image.Resampling.LANCZOS)
    for own in (Mirrors(size={"shortest_edge": 16}, crop_size=16), lanczos):
        assert Processor(own).on_device(pictures(2), "cpu") is None


def test_a_processor_learns_a_size_once_and_reads_pictures_without_pillow() -> None:
    calls: list[int] = []

    class Counts(CLIPImageProcessorPil):
        def normalize(self, *given: Any, **named: Any) -> Any:
            calls.append(1)
            return super().normalize(*given, **named)

    own = Processor(Counts(size={"shortest_edge": 32}, crop_size=32))
    images = [Picture(torch.full((8, 6, 3), value, dtype=torch.uint8)) for value in (3, 200)]
    first, again = own.on_device(images, "cpu"), own.on_device(images[::-1], "cpu")
    assert first is not None and again is not None
    assert torch.equal(first["pixel_values"], again["pixel_values"].flip(0)) and len(calls) == 2
    assert all(image.pixels is not None for image in images)  # nobody made Pillow's of them
    assert torch.equal(own(images, "cpu")["pixel_values"], first["pixel_values"])
