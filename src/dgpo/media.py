"""Videos and sounds that a pipeline makes: what rewards are given of them, and their files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from dgpo.errors import MissingExtra, UserError

KEY_FRAMES = 3
VideoFormat = Literal["mp4", "gif"]
_RATES = ("sampling_rate", "sample_rate")


@dataclass(frozen=True, eq=False)
class Video:
    """A video.

    Args:
        frames: uint8 [T, 3, H, W].
    """

    frames: Tensor

    @property
    def pictures(self) -> list[Image.Image]:
        """The frames as T pictures."""
        return [Image.fromarray(frame) for frame in self.frames.permute(0, 2, 3, 1).numpy()]

    def key_frames(self, count: int = KEY_FRAMES) -> list[Image.Image]:
        """At most ``count`` pictures, evenly from the first frame to the last."""
        places = np.linspace(0, len(self.frames) - 1, min(count, len(self.frames))).round()
        pictures = self.pictures
        return [pictures[int(place)] for place in places]

    def save(self, file: Path, fps: int) -> None:
        """Write ``.mp4`` (H.264) or ``.gif``, by the file's suffix; sides of odd length are
        brought to even ones by repeating the last row or column, as H.264 wants it.

        Raises:
            MissingExtra: an mp4, and imageio-ffmpeg is not installed.
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
    """A sound.

    Args:
        waveform: float32 [channels, samples] in -1..1.
        sampling_rate: samples a second.
    """

    waveform: Tensor
    sampling_rate: int

    def save(self, file: Path) -> None:
        """Write a ``.wav`` of 16 bits; what is louder than 1 is cut."""
        from scipy.io import wavfile

        whole = (self.waveform.clamp(-1, 1) * 32767).round().to(torch.int16)
        wavfile.write(file, self.sampling_rate, whole.T.contiguous().numpy())

    def picture(self, size: tuple[int, int] = (160, 80)) -> Image.Image:
        """The waveform as it is drawn in grids, from left to right: the range of the samples of
        each column, or a line where there are fewer samples than columns."""
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


def media_of(result: Any, pipe: Any) -> list[Any]:
    """What a pipeline's call returned: B pictures, videos or sounds.

    Args:
        result: the first of its outputs: pictures, lists of frames, or an array of samples.
        pipe: knows the sampling rate of its sounds.

    Raises:
        UserError: it is none of these, or the sampling rate cannot be found.
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
    arrays = np.stack([np.asarray(frame.convert("RGB")) for frame in frames])
    return Video(torch.from_numpy(arrays).permute(0, 3, 1, 2))


def sampling_rate(pipe: Any) -> int:
    """Samples a second of the sounds that a pipeline makes, as its parts say.

    Raises:
        UserError: none of them does.
    """
    holders = [pipe, *(getattr(pipe, name, None) for name in ("vocoder", "vae"))]
    for holder in holders:
        for place in (getattr(holder, "config", None), holder):
            for name in _RATES:
                if isinstance(rate := getattr(place, name, None), (int, float)):
                    return int(rate)
    raise UserError(f"model: {type(pipe).__name__} does not say the sampling rate of its sounds")


def stacked(made: Sequence[Any]) -> tuple[Tensor, dict[str, Any]]:
    """Pictures, videos or sounds of one size as one tensor, and what else they are.

    Args:
        made: one or more, all of one kind.

    Returns:
        pictures [B, H, W] or [B, H, W, channels], videos uint8 [B, T, 3, H, W] or sounds float32
        [B, channels, samples], and JSON values: :func:`unstacked` makes the same of both again.
    """
    first = made[0]
    if isinstance(first, Video):
        return torch.stack([one.frames for one in made]), {"kind": "video"}
    if isinstance(first, Sound):
        waves = torch.stack([one.waveform for one in made])
        return waves, {"kind": "sound", "sampling_rate": first.sampling_rate}
    return torch.from_numpy(np.stack([np.asarray(one) for one in made])), {"kind": "picture"}


def unstacked(tensor: Tensor, facts: dict[str, Any]) -> list[Any]:
    """The pictures, videos or sounds of :func:`stacked`."""
    if facts["kind"] == "video":
        return [Video(frames) for frames in tensor]
    if facts["kind"] == "sound":
        return [Sound(wave, facts["sampling_rate"]) for wave in tensor]
    return [Image.fromarray(picture) for picture in tensor.numpy()]


def given_to_rewards(
    made: Sequence[Any], columns: dict[str, list[Any]]
) -> tuple[list[Any], dict[str, list[Any]]]:
    """What a reward gets: pictures as they are, videos as frames [T, 3, H, W], sounds as
    waveforms [channels, samples] with a column ``sampling_rate``."""
    given = [
        one.frames if isinstance(one, Video) else one.waveform if isinstance(one, Sound) else one
        for one in made
    ]
    rates = [one.sampling_rate for one in made if isinstance(one, Sound)]
    return given, {**columns, "sampling_rate": rates} if rates else columns


def check_format(video: VideoFormat) -> None:
    """See that videos can be written.

    Raises:
        MissingExtra: as mp4, and imageio-ffmpeg is not installed.
    """
    if video == "mp4":
        try:
            import imageio_ffmpeg  # noqa: F401  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise MissingExtra("imageio-ffmpeg (or samples.video: gif)", "media") from error


def save_media(
    made: Sequence[Any], folder: Path, video: VideoFormat, fps: int, first: int = 0
) -> list[Path]:
    """Write pictures, videos and sounds as ``FOLDER/00000.png`` (mp4, gif, wav), in order, from the
    number ``first`` on.

    Raises:
        MissingExtra: see :func:`check_format`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    for number, one in enumerate(made, start=first):
        suffix = "wav" if isinstance(one, Sound) else video if isinstance(one, Video) else "png"
        files.append(folder / f"{number:05d}.{suffix}")
        if isinstance(one, Video):
            one.save(files[-1], fps)
        else:
            one.save(files[-1])
    return files
