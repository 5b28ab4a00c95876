"""Videos and sounds that a pipeline makes are given to rewards and saved as files."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from dgpo.errors import MissingExtra, UserError
from dgpo.pictures import array_of, rgb

KEY_FRAMES = 3
"""How many frames of a video are shown where pictures are shown."""
VideoFormat = Literal["mp4", "gif"]
"""The file formats in which videos can be written."""
_RATES = ("sampling_rate", "sample_rate")


@dataclass(frozen=True, eq=False)
class Video:
    """A ``Video`` holds the frames of one video.

    Args:
        frames: uint8 [T, 3, H, W].

    >>> video = Video(torch.zeros(8, 3, 16, 32, dtype=torch.uint8))
    >>> len(video.key_frames()), video.pictures[0].size
    (3, (32, 16))
    """

    frames: Tensor

    @property
    def pictures(self) -> list[Image.Image]:
        """Return the T frames as pictures."""
        return [Image.fromarray(frame) for frame in self.frames.permute(0, 2, 3, 1).numpy()]

    def key_frames(self, count: int = KEY_FRAMES) -> list[Image.Image]:
        """Return at most ``count`` pictures, evenly spaced from the first frame to the last."""
        places = np.linspace(0, len(self.frames) - 1, min(count, len(self.frames))).round()
        pictures = self.pictures
        return [pictures[int(place)] for place in places]

    def save(self, file: Path, fps: int) -> None:
        """Write the video as ``.mp4`` (H.264) or ``.gif``, by the file's suffix.

        H.264 needs sides of even length, so an odd one gets its last row or column twice.

        Args:
            file: where to write.
            fps: frames a second.

        Raises:
            MissingExtra: the file is an mp4 and imageio-ffmpeg is not installed.
        """
        if file.suffix == ".gif":
            first, *others = self.pictures
            how = {"save_all": True, "append_images": others, "loop": 0}
            first.save(file, duration=round(1000 / fps), **how)
            return
        check_format("mp4")
        import imageio.v3 as iio

        frames = self.frames.permute(0, 2, 3, 1).numpy()
        height, width = frames.shape[1:3]
        even = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        iio.imwrite(
            file, even, plugin="FFMPEG", fps=fps, codec="libx264", macro_block_size=2, quality=8
        )


@dataclass(frozen=True, eq=False)
class Sound:
    """A ``Sound`` holds the waveform of one sound.

    Args:
        waveform: float32 [channels, samples] in -1..1.
        sampling_rate: samples a second.

    >>> Sound(torch.zeros(2, 8000), sampling_rate=16000).picture(size=(160, 80)).size
    (160, 80)
    """

    waveform: Tensor
    sampling_rate: int

    def save(self, file: Path) -> None:
        """Write a ``.wav`` of 16 bits; values beyond -1..1 are cut off."""
        from scipy.io import wavfile

        whole = (self.waveform.clamp(-1, 1) * 32767).round().to(torch.int16)
        wavfile.write(file, self.sampling_rate, whole.T.contiguous().numpy())

    def picture(self, size: tuple[int, int] = (160, 80)) -> Image.Image:
        """Draw the waveform from left to right, as grids show it.

        Each column shows the range of its samples; a sound with fewer samples than columns is a
        line.

        Args:
            size: width and height in pixels.
        """
        width, height = size
        image = Image.new("RGB", size, (255, 255, 255))
        draw = ImageDraw.Draw(image)
        wave = self.waveform.mean(0).clamp(-1, 1)
        middle = (height - 1) / 2
        if wave.numel() < width:
            xs = torch.linspace(0, width - 1, wave.numel()).tolist()
            ys = (middle * (1 - wave)).tolist()
            draw.line(list(zip(xs, ys, strict=True)), fill=(40, 80, 160))
            return image
        for x, part in enumerate(wave.tensor_split(width)):
            low, high = (middle * (1 - float(value)) for value in (part.max(), part.min()))
            draw.line([(x, low), (x, high)], fill=(40, 80, 160))
        return image


@dataclass(frozen=True, eq=False)
class Lost:
    """A ``Lost`` stands in the place of a sample that nobody may judge.

    Args:
        why: what is wrong with it.
        made: what the pipeline gave, such as a black picture.
    """

    why: str
    made: Any


def made_of(one: Any) -> Any:
    """Return a sample as the pipeline gave it, also if it is lost."""
    return one.made if isinstance(one, Lost) else one


def media_of(result: Any, pipe: Any) -> list[Any]:
    """Return what a pipeline's call made as B pictures, videos or sounds.

    Args:
        result: the first output of the call: pictures, lists of frames, or an array of samples.
        pipe: the pipeline, which knows the sampling rate of its sounds.

    Raises:
        UserError: the result is none of these, or the pipeline tells no sampling rate.
    """
    rows = list(result)
    if all(isinstance(row, Image.Image) for row in rows):
        return rows
    if all(isinstance(row, (list, tuple)) for row in rows):
        return [_video(row) for row in rows]
    waves = [torch.as_tensor(row).detach().float().cpu() for row in rows]
    if any(wave.ndim not in (1, 2) for wave in waves):
        shapes = sorted({tuple(wave.shape) for wave in waves})
        raise UserError(
            f"model: {type(pipe).__name__} returned {shapes}, neither pictures nor sounds"
        )
    rate = sampling_rate(pipe)
    return [Sound(wave if wave.ndim == 2 else wave[None], rate) for wave in waves]


def _video(frames: Sequence[Image.Image]) -> Video:
    arrays = np.stack([array_of(rgb(frame)) for frame in frames])
    return Video(torch.from_numpy(arrays).permute(0, 3, 1, 2))


def sampling_rate(pipe: Any) -> int:
    """Return how many samples a second the sounds of a pipeline have.

    Raises:
        UserError: no part of the pipeline says so.
    """
    holders = [pipe, *(getattr(pipe, name, None) for name in ("vocoder", "vae"))]
    for holder in holders:
        for place in (getattr(holder, "config", None), holder):
            for name in _RATES:
                if isinstance(rate := getattr(place, name, None), (int, float)):
                    return int(rate)
    raise UserError(f"model: {type(pipe).__name__} does not say the sampling rate of its sounds")


def stacked(made: Sequence[Any]) -> tuple[Tensor, dict[str, Any]]:
    """Stack pictures, videos or sounds of one kind and size into one tensor; none may be lost.

    Args:
        made: B of them, at least one.

    Returns:
        A tensor and JSON values, from which :func:`unstacked` makes the same objects again. The
        tensor holds pictures [B, H, W] or [B, H, W, channels], videos uint8 [B, T, 3, H, W], or
        sounds float32 [B, channels, samples].

    >>> tensor, facts = stacked([Sound(torch.zeros(2, 100), 8000)])
    >>> tensor.shape, facts
    (torch.Size([1, 2, 100]), {'kind': 'sound', 'sampling_rate': 8000})
    """
    first = made[0]
    if isinstance(first, Video):
        return torch.stack([one.frames for one in made]), {"kind": "video"}
    if isinstance(first, Sound):
        waves = torch.stack([one.waveform for one in made])
        return waves, {"kind": "sound", "sampling_rate": first.sampling_rate}
    return torch.from_numpy(np.stack([array_of(one) for one in made])), {"kind": "picture"}


def unstacked(tensor: Tensor, facts: dict[str, Any]) -> list[Any]:
    """Return the pictures, videos or sounds that :func:`stacked` was given."""
    if facts["kind"] == "video":
        return [Video(frames) for frames in tensor]
    if facts["kind"] == "sound":
        return [Sound(wave, facts["sampling_rate"]) for wave in tensor]
    return [Image.fromarray(picture) for picture in tensor.numpy()]


def given_to_rewards(
    made: Sequence[Any], columns: dict[str, list[Any]]
) -> tuple[list[Any], dict[str, list[Any]]]:
    """Return what a reward is given: the samples and the columns of their rows.

    Pictures stay as they are, a video becomes its frames [T, 3, H, W], and a sound its waveform
    [channels, samples], with a column ``sampling_rate``.
    """
    given = [
        one.frames if isinstance(one, Video) else one.waveform if isinstance(one, Sound) else one
        for one in made
    ]
    rates = [one.sampling_rate for one in made if isinstance(one, Sound)]
    return given, {**columns, "sampling_rate": rates} if rates else columns


def check_format(video: VideoFormat) -> None:
    """Check that videos can be written in a format.

    Raises:
        MissingExtra: the format is mp4 and imageio-ffmpeg is not installed.
    """
    if video == "mp4":
        try:
            import imageio_ffmpeg  # noqa: F401  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise MissingExtra("imageio-ffmpeg (or samples.video: gif)", "media") from error


def save_media(
    made: Sequence[Any], folder: Path, video: VideoFormat, fps: int, first: int = 0
) -> list[Path]:
    """Write pictures, videos and sounds in order as ``FOLDER/00000.png`` (or mp4, gif, wav).

    A sample that is lost has no file, and a warning says why.

    Args:
        made: what to write.
        folder: made if it is not there.
        video: the format of videos.
        fps: frames a second of videos.
        first: the number of the first file.

    Raises:
        MissingExtra: see :func:`check_format`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    for number, one in enumerate(made, start=first):
        if isinstance(one, Lost):
            warnings.warn(f"{number:05d} is lost and not written: {one.why}", stacklevel=2)
            continue
        suffix = "wav" if isinstance(one, Sound) else video if isinstance(one, Video) else "png"
        files.append(folder / f"{number:05d}.{suffix}")
        if isinstance(one, Video):
            one.save(files[-1], fps)
        else:
            one.save(files[-1])
    return files
