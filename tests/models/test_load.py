"""The ``model`` of a recipe: a name, a folder, or a clear refusal."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dgpo.errors import UserError
from dgpo.models.load import load_pipeline
from dgpo.models.pipeline import PipelineModel
from families.tiny import TINY, build, conditioning


def test_a_saved_pipeline_comes_back(tmp_path: Path) -> None:
    pipe = build("sd15")
    pipe.save_pretrained(tmp_path)
    loaded = load_pipeline(str(tmp_path))
    assert type(loaded) is type(pipe)
    before, after = (PipelineModel(p, call=TINY["sd15"].call) for p in (pipe, loaded))
    a, b = (
        m.rollout(
            conditioning("sd15", m),
            steps=2,
            generators=[torch.Generator().manual_seed(i) for i in range(2)],
            decode=False,
        ).x0
        for m in (before, after)
    )
    torch.testing.assert_close(a, b)
    half = load_pipeline(str(tmp_path), "bfloat16")
    assert next(half.unet.parameters()).dtype == torch.bfloat16


def test_a_folder_without_a_pipeline_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter.safetensors").touch()
    with pytest.raises(UserError) as caught:
        load_pipeline(str(tmp_path))
    for word in ("model_index.json", "adapter.safetensors", "save_pretrained"):
        assert word in str(caught.value)


def _broken_index(folder: Path) -> str:
    (folder / "model_index.json").write_text("{")
    return "not a valid JSON"


def _unknown_class(folder: Path) -> str:
    (folder / "model_index.json").write_text('{"_class_name": "NoSuchPipeline"}')
    return "NoSuchPipeline"


def _weights_gone(folder: Path) -> str:
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    return "diffusion_pytorch_model"


def _weights_cut_short(folder: Path) -> str:
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    return "diffusion_pytorch_model|[Hh]eader"


@pytest.mark.parametrize(
    "spoil", [_broken_index, _unknown_class, _weights_gone, _weights_cut_short]
)
def test_a_broken_folder_is_named_with_what_is_wrong(
    spoil: Callable[[Path], str], tmp_path: Path
) -> None:
    build("sd15").save_pretrained(tmp_path)
    word = spoil(tmp_path)
    with pytest.raises(
        UserError, match=f"(?s){re.escape(str(tmp_path))}.*({word}).*save_pretrained"
    ):
        load_pipeline(str(tmp_path))


@pytest.mark.parametrize("name", ["poket", "./nowhere", "a/b/c", "~/none"])
def test_what_is_neither_folder_nor_name_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="pocket"):
        load_pipeline(name)


def test_a_function_of_the_users_own(tmp_path: Path) -> None:
    made = load_pipeline("families.tiny:sd15")
    assert type(made).__name__ == "StableDiffusionPipeline"
    with pytest.raises(UserError):
        load_pipeline("families.tiny:no_such_pipeline")


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(UserError, match=r"'fp16'.*bfloat16"):
        load_pipeline("pocket", "fp16")
