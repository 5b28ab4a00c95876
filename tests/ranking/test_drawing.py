"""Groups that are drawn for people to rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

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
