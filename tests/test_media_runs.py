"""`dgpo train` for films and sounds, from a recipe file to files that can be played."""

from __future__ import annotations

import json
from pathlib import Path

import imageio.v3 as iio
import pytest
import yaml
from PIL import Image
from scipy.io import wavfile
from typer.testing import CliRunner

from dgpo.cli import app
from tiny_runs import light

FILM = """
def score(images, prompts):
    for film in images:
        assert tuple(film.shape) == (5, 3, 32, 32) and str(film.dtype) == "torch.uint8"
    return [float(film[:, 0].float().mean()) for film in images]
"""
SOUND = """
def score(images, prompts, sampling_rate):
    assert sampling_rate == [40] * len(images)
    for wave in images:
        assert wave.ndim == 2 and wave.shape[0] == 2
    return [float(wave.abs().mean()) for wave in images]
"""


def trained(folder: Path, model: str, reward: str, call: dict) -> Path:
    (folder / "reward.py").write_text(reward)
    (folder / "prompts.txt").write_text("a photo of cat\nred dog\n")
    recipe = {
        "model": model,
        "algorithm": {"timesteps": {"count": 1, "indices": [0, 1]}},
        "rewards": {"mine": {"use": f"{folder / 'reward.py'}:score"}},
        "prompts": {"train": str(folder / "prompts.txt"), "eval": str(folder / "prompts.txt")},
        "group_size": 3,
        "groups_per_iteration": 2,
        "rollout": {"steps": 2, "call": call},
        "train": {"iterations": 1, "lr": 1e-2},
        "lora": {"rank": 2, "alpha": 4, "targets": ["to_q", "to_v"]},
        "eval": {"every": 0, "at_start": False},
        "samples": {"count": 2, "fps": 5},
        "checkpoint": {"every": 0},
        "run": {"dir": str(folder / "run")},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    result = CliRunner().invoke(app, ["train", str(folder / "recipe.yaml")])
    assert result.exit_code == 0, result.output
    rows = [json.loads(r) for r in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 1 and rows[0]["groups_dropped"] == 0
    assert list((folder / "run" / "lora").glob("*.safetensors"))
    return folder / "run" / "samples"


def test_a_film(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    light(monkeypatch)
    call = {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 16}
    samples = trained(tmp_path, "families.video:wan", FILM, call)
    for name in ("before", "after"):
        frames = iio.imread(samples / name / "00001.mp4", plugin="FFMPEG")
        assert frames.shape == (5, 32, 32, 3)
        with Image.open(samples / f"{name}.png") as sheet:
            assert sheet.width > sheet.height  # key frames side by side


def test_a_sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    light(monkeypatch)
    call = {"audio_duration": 0.4}
    samples = trained(tmp_path, "families.audio:ace_step", SOUND, call)
    rate, wave = wavfile.read(samples / "after" / "00000.wav")
    assert rate == 40 and wave.shape[1] == 2 and wave.any()
    assert (samples / "before_after.png").is_file()
