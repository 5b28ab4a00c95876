"""Groups that are drawn for people to rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import dgpo.models.load
from dgpo.errors import UserError
from dgpo.ranking.drawing import Artist
from dgpo.recipe import Recipe
from tiny_runs import settings


def recipe(folder: Path, row: dict[str, Any], **changes: Any) -> Recipe:
    file = folder / "rows.jsonl"
    file.write_text(json.dumps(row))
    given = {"model": "families.tiny:sd3_small", "prompts": {"train": str(file)}, **changes}
    return Recipe.from_dict(settings(**given))


def test_a_row_with_a_size_of_its_own_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"height = 32.*rollout\.call\.height"):
        Artist(recipe(tmp_path, {"prompt": "red dog", "height": 32}))


def test_the_vae_has_the_precision_of_the_recipe(tmp_path: Path, monkeypatch: Any) -> None:
    made: list[Any] = []
    load = dgpo.models.load.load_pipeline

    def noted(*given: Any, **named: Any) -> Any:
        made.append(load(*given, **named))
        return made[0]

    monkeypatch.setattr(dgpo.models.load, "load_pipeline", noted)
    how = {"precision": "bfloat16", "memory": {"vae_precision": "float32"}}
    artist = Artist(recipe(tmp_path, {"prompt": "red dog"}, **how))
    assert made[0].vae.dtype == torch.float32 and made[0].transformer.dtype == torch.bfloat16
    _, images = artist.draw(0)
    assert len(images) == 4
