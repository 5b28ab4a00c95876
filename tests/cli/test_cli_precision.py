"""`--vae-precision`: the autoencoder's own, for the commands that have no recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import dgpo.models.load
from commands import run
from dgpo.evaluation.benchmarks import Benchmark
from families.tiny import sd3

ROWS = [{"prompt": "a photo of a red cat", "seed": 0}, {"prompt": "a small dog", "seed": 1}]


def rows() -> list[dict[str, Any]]:
    return ROWS


TINY = Benchmark("tiny", "cli.test_cli_precision:rows", ("brightness",), steps=2)
BOTH = ["--precision", "bfloat16", "--vae-precision", "float32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("sd3")
    sd3().save_pretrained(place)
    return str(place)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The pipelines that a command loads."""
    made, load = [], dgpo.models.load.load_pipeline

    def noted(*given: Any, **named: Any) -> Any:
        made.append(load(*given, **named))
        return made[-1]

    monkeypatch.setattr(dgpo.models.load, "load_pipeline", noted)
    return made


def precisions(pipe: Any) -> list[torch.dtype]:
    return [pipe.vae.dtype, pipe.transformer.dtype, pipe.text_encoder.dtype]


WANTED = [torch.float32, torch.bfloat16, torch.bfloat16]


def pixels(place: Path) -> Any:
    return np.asarray(Image.open(place / "00000.png")).astype(int)


def test_sample_with_a_vae_of_its_own_precision(
    folder: str, loaded: list[Any], tmp_path: Path
) -> None:
    common = ["sample", "--model", folder, "--steps", "2", "--prompt", ROWS[0]["prompt"], *BOTH]
    run(*common, "--out", str(tmp_path / "own"))
    run(*common, "--guidance-scale", "7", "--out", str(tmp_path / "asked"))
    assert [precisions(pipe) for pipe in loaded] == [WANTED, WANTED]
    # 7 is the pipeline's own: the picture that a rollout makes with it
    assert abs(pixels(tmp_path / "own") - pixels(tmp_path / "asked")).max() <= 1


def test_eval_with_a_vae_of_its_own_precision(folder: str, loaded: list[Any]) -> None:
    here = "cli.test_cli_precision:TINY"
    assert "brightness" in run("eval", "--model", folder, "--benchmark", here, *BOTH).output
    assert precisions(loaded[0]) == WANTED


@pytest.mark.slow
def test_check_with_a_vae_of_its_own_precision(folder: str, loaded: list[Any]) -> None:
    assert "StableDiffusion3Pipeline" in run("check", folder, *BOTH).output
    assert [precisions(pipe) for pipe in loaded] == [WANTED, WANTED]


@pytest.mark.parametrize(
    "arguments",
    [
        ["sample", "--prompt", "a", "--out", "x", "--model"],
        ["eval", "--benchmark", "pocket-geneval", "--model"],
        ["check"],
    ],
)
def test_a_precision_that_is_none(arguments: list[str]) -> None:
    said = run(*arguments, "pocket", "--vae-precision", "fp16", code=2).stderr
    assert "--vae-precision" in said and "'fp16'" in said and "bfloat16" in said


def without_vae() -> Any:
    pipe = sd3()
    pipe.register_modules(vae=None)
    return pipe


def test_a_pipeline_without_an_autoencoder() -> None:
    model = "cli.test_cli_precision:without_vae"
    said = run("check", model, "--vae-precision", "float32", code=2).stderr
    assert "StableDiffusion3Pipeline has no vae" in said and "--vae-precision" in said
