"""What a trainer is given in Python: pipelines and recipes of every kind, or one clear error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from dgpo.errors import UserError
from dgpo.pocket import load_pocket, load_pocket_sd, load_pocket_signs
from dgpo.registry import MODELS
from dgpo.rewards.shipped.stand_in import brightness
from dgpo.trainer import Trainer
from dgpo.training.arguments import Given, full_recipe
from families.tiny import build
from tiny_runs import PROMPTS, settings, trainer


def test_a_pipeline_that_was_read_from_a_folder_is_known_by_it(tmp_path: Path) -> None:
    build("sd15").save_pretrained(tmp_path)
    read = DiffusionPipeline.from_pretrained(tmp_path)
    assert isinstance(read.config["_name_or_path"], Path)  # as diffusers keeps it
    assert full_recipe(None, Given(model=read)).model == str(tmp_path)


@pytest.mark.parametrize(
    ("name", "load"),
    [("pocket", load_pocket), ("pocket-signs", load_pocket_signs), ("pocket-sd", load_pocket_sd)],
)
def test_a_loaded_pocket_is_known_by_its_name(name: str, load: Callable[[], Any]) -> None:
    assert full_recipe(None, Given(model=load())).model == name
    assert name in MODELS


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"model": 3}, "model: int is no diffusers pipeline"),
        ({"model": torch.nn.Linear(2, 2)}, "model: Linear is no diffusers pipeline"),
        ({"recipe": 7}, "recipe = 7: give a Recipe"),
        ({"recipe": ["pocket-geneval"]}, "recipe = .*: give a Recipe"),
        ({"reward_funcs": [3]}, "reward 'int' is 3"),
    ],
)
def test_what_is_given_is_refused_by_its_name(
    given: dict[str, Any], words: str, tmp_path: Path
) -> None:
    usual: dict[str, Any] = {"reward_funcs": brightness, "train_dataset": PROMPTS}
    usual["recipe"] = settings(run={"dir": str(tmp_path / "run")})
    with pytest.raises(UserError, match=words):
        Trainer(**{**usual, **given})


def test_a_pipeline_that_was_trained_before_is_refused_with_the_way_out(tmp_path: Path) -> None:
    run = trainer(tmp_path / "one")
    pipe = run.model.pipe
    with pytest.raises(UserError, match=r"carries a LoRA already.*unload_lora_weights"):
        trainer(tmp_path / "two", model=pipe)
    with pytest.raises(UserError, match="carries a LoRA already"):
        trainer(tmp_path / "two", model=pipe, lora=None)
    pipe.unload_lora_weights()
    assert trainer(tmp_path / "two", model=pipe).policy.parameters()
