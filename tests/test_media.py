"""Videos and sounds: what rewards are given of them, their files, and how grids show them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import wavfile

from dgpo.errors import MissingExtra, UserError
from dgpo.media import (
    Sound,
    Video,
    check_format,
    media_of,
    sampling_rate,
    save_media,
    stacked,
    unstacked,
)
from dgpo.prompts import load_prompts
from dgpo.rewards import load_rewards
from dgpo.rewards.shipped.video import PerFrame
from dgpo.run.pictures import grid, thumbnail


def video(frames: int = 6, height: int = 16, width: int = 32) -> Video:
    """Frame t is grey, 40 t; the left half of each is darker."""
    made = torch.full((frames, 3, height, width), 0, dtype=torch.uint8)
    for t in range(frames):
        made[t] = 40 * t
        made[t, :, :, : width // 2] //= 2
    return Video(made)


def sound(rate: int = 8000) -> Sound:
    tone = torch.sin(2 * torch.pi * 440 * torch.arange(800) / rate)
    return Sound(torch.stack([tone, -0.5 * tone]), rate)


def test_a_reward_gets_frames_or_a_waveform_with_its_rate() -> None:
    given: list[Any] = []

    def watch(images: Any, prompts: Any, sampling_rate: Any = None) -> list[float]:
        given.append((images, sampling_rate))
        return [0.0] * len(images)

    rewards, rows = load_rewards(watch), load_prompts(["a", "b"])
    rewards([video(), video(4)], rows)
    rewards([sound(), sound(16000)], rows)
    (films, none), (sounds, rates) = given
    assert [tuple(film.shape) for film in films] == [(6, 3, 16, 32), (4, 3, 16, 32)]
    assert films[0].dtype == torch.uint8 and none is None
    assert torch.equal(sounds[0], sound().waveform) and rates == [8000, 16000]


def test_what_a_pipeline_returns_becomes_media() -> None:
    class Pipe:
        class vocoder:
            class config:
                sampling_rate = 16000

    frames = video().pictures
    (film,) = media_of([frames], Pipe())
    assert torch.equal(film.frames, video().frames)
    mono, stereo = media_of([torch.zeros(5), np.zeros((2, 5), np.float32)], Pipe())
    assert mono.waveform.shape == (1, 5) and stereo.waveform.shape == (2, 5)
    assert mono.sampling_rate == sampling_rate(Pipe()) == 16000
    assert media_of(frames, Pipe()) == frames
    with pytest.raises(UserError, match="neither pictures nor sounds"):
        media_of(torch.zeros(1, 2, 3, 4), Pipe())
    with pytest.raises(UserError, match="sampling rate"):
        media_of([torch.zeros(5)], object())


def test_files_hold_what_was_made(tmp_path: Path) -> None:
    made = [video(height=15), sound(), Image.new("RGB", (4, 4), (1, 2, 3))]
    files = save_media(made, tmp_path, "mp4", 8)
    assert [file.name for file in files] == ["00000.mp4", "00001.wav", "00002.png"]
    frames = iio.imread(files[0], plugin="FFMPEG")
    assert frames.shape == (6, 16, 32, 3)  # sides of H.264 are even
    assert abs(float(frames[4][:, 20:].mean()) - 160) < 8
    assert abs(float(frames[4][:, :12].mean()) - 80) < 8
    assert iio.immeta(files[0], plugin="FFMPEG")["fps"] == 8
    rate, wave = wavfile.read(files[1])
    assert rate == 8000 and wave.shape == (800, 2)
    np.testing.assert_allclose(wave.T / 32767, sound().waveform, atol=2e-5)
    (gif,) = save_media([video()], tmp_path, "gif", 20)
    with Image.open(gif) as opened:
        assert getattr(opened, "n_frames", 0) == 6 and opened.info["duration"] == 50


def test_mp4_without_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "imageio_ffmpeg", None)
    check_format("gif")
    with pytest.raises(MissingExtra, match=r"samples\.video: gif.*dgpo\[media\]"):
        check_format("mp4")


def test_grids_show_key_frames_and_waveforms() -> None:
    first, middle, last = video(7).key_frames()
    assert [f.getpixel((31, 0))[0] for f in (first, middle, last)] == [0, 120, 240]  # type: ignore
    strip = np.asarray(thumbnail(video(7), 98 * 2))
    shown = [int(strip[8, x, 0]) for x in (60, 126, 192)]
    assert shown == [0, 120, 240]
    drawn = np.asarray(thumbnail(sound(), 160))
    assert (drawn != 255).any(-1).any(0).mean() > 0.9  # something in nearly every column
    few = Sound(torch.tensor([[1.0, -1.0]]), 8000).picture((100, 50))
    line = np.argwhere((np.asarray(few) != 255).any(-1))
    assert line[0].tolist() == [0, 0] and line[-1].tolist() == [49, 99]
    sheet = grid([video(), sound()], ["a film", "a tone"])
    assert sheet.width > 2 * 160


def test_a_short_video_has_as_many_key_frames_as_frames() -> None:
    assert len(video(2).key_frames()) == 2


def test_per_frame_rewards_take_frames() -> None:
    def grey(images: Any, prompts: Any) -> list[float]:
        return [float(np.asarray(image).mean()) for image in images]

    expected = float(video().frames.float().mean())
    assert PerFrame(grey)([video().frames], ["a"]) == pytest.approx([expected])
    with pytest.raises(UserError, match="row 0"):
        PerFrame(grey)([torch.zeros(2, 5)], ["a"])


@pytest.mark.parametrize(
    "made",
    [
        [Image.new("RGB", (5, 4), (1, 2, 3)), Image.new("RGB", (5, 4), (250, 0, 7))],
        [Image.new("L", (5, 4), 9)],
        [Image.new("RGBA", (5, 4), (1, 2, 3, 4))],
        [video(), video()],
        [sound(), sound()],
    ],
    ids=["pictures", "grey", "with alpha", "videos", "sounds"],
)
def test_stacked_and_back(made: list[Any]) -> None:
    tensor, facts = stacked(made)
    assert len(tensor) == len(made)
    for one, again in zip(made, unstacked(tensor, json.loads(json.dumps(facts))), strict=True):
        assert type(again) is (Image.Image if isinstance(one, Image.Image) else type(one))
        if isinstance(one, Image.Image):
            assert (again.mode, again.tobytes()) == (one.mode, one.tobytes())
        elif isinstance(one, Video):
            assert torch.equal(again.frames, one.frames)
        else:
            assert torch.equal(again.waveform, one.waveform)
            assert again.sampling_rate == one.sampling_rate
