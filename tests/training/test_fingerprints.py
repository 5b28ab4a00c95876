"""Fingerprints: what counts as another set of rows, and what a run is told of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dgpo.errors import UserError
from dgpo.preferences import GroupWriter, read_groups
from dgpo.prompts import Prompt, load_prompts
from dgpo.rewards import load_rewards
from dgpo.training.fingerprints import compared, of_file, of_rows


def digest(*rows: Any) -> str:
    return of_rows("a.txt", load_prompts(list(rows)))["sha256"]


def test_texts_columns_and_their_order_count() -> None:
    row = {"prompt": "a", "want": 0, "seen": [1, {"b": None}]}
    first = of_rows("a.txt", load_prompts([row, "b"]))
    assert (first["source"], first["rows"]) == ("a.txt", 2) and len(first["sha256"]) == 64
    assert first["sha256"] == digest({k: row[k] for k in reversed(row)}, "b")
    others = [digest("b", row), digest(row), digest(row, "b", "b"), digest(row, "c")]
    others += [digest({**row, "want": want}, "b") for want in (1, "0", None, [0])]
    assert len({first["sha256"], *others}) == 1 + len(others)


def test_odd_values_are_the_same_in_every_process() -> None:
    class Odd:
        pass

    picture = Image.new("RGB", (4, 4), "red")

    def rows() -> list[Prompt]:
        odd = {"a": Odd(), "b": {"x", "y", "z"}, "c": np.arange(3), "d": float("nan"), "e": {1: 2}}
        return [Prompt("\ud83d a", {**odd, "f": picture.copy(), "g": b"x"})]

    assert of_rows(None, rows()) == of_rows(None, rows())
    code = (
        "from dgpo.training.fingerprints import _plain\n"
        "print(_plain({'b': {'x', 'y', 'z'}, 'c': frozenset('abc')}))"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(filter(None, sys.path))},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(said) == 1


def test_a_picture_counts_and_not_where_it_lies(tmp_path: Path) -> None:
    made = []
    for name, color in (("a", "red"), ("b", "red"), ("c", "blue")):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8), color).save(tmp_path / name / "x.png")
        rows = tmp_path / name / "rows.jsonl"
        rows.write_text('{"prompt": "p", "image": "x.png"}\n')
        made.append(of_rows(str(rows), load_prompts(rows))["sha256"])
    assert made[0] == made[1] != made[2]


def test_ranks_and_pictures_of_ranked_groups_count(tmp_path: Path) -> None:
    def made(name: str, color: str, reward: float) -> str:
        pictures = [Image.new("RGB", (8, 8), one) for one in ("red", color)]
        GroupWriter(tmp_path / name).add("p", pictures, rewards=[1.0, reward])
        return of_rows(name, read_groups(tmp_path / name))["sha256"]

    assert made("a", "blue", 0.0) == made("b", "blue", 0.0)
    assert len({made("c", "blue", 0.0), made("d", "blue", 0.5), made("e", "green", 0.0)}) == 3


def test_a_changed_file_of_a_reward_has_another_fingerprint(tmp_path: Path) -> None:
    def source(place: str, text: str) -> dict[str, str]:
        file = tmp_path / place / "score.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"def red(images, prompts):\n    return [{text}] * len(images)\n")
        return load_rewards({"mine": {"use": f"{file}:red", "rank": True}, "redness": 1.0}).sources

    first = source("a", "0.5")
    assert list(first) == ["mine"]
    assert source("b", "0.5") == first and source("c", "0.6") != first


def rows(*texts: str, source: str | None = "/x/a.txt") -> dict[str, Any]:
    return {"prompts.train": of_rows(source, load_prompts(list(texts)))}


def test_other_rows_in_the_place_of_those_before_are_refused(tmp_path: Path) -> None:
    place = tmp_path / "run" / "checkpoints" / "00000002"
    assert compared({}, rows("a"), place) == []  # a checkpoint of an earlier version
    assert compared(rows("a"), rows("a", source="/y/a.txt"), place) == []
    words = r"prompts\.train = /x/a\.txt: these 2 rows are not the 1 that the run in .*/run was"
    with pytest.raises(UserError, match=words) as refused:
        compared(rows("a"), rows("a", "b"), place)
    assert "prompts.train=FILE" in str(refused.value)
    with pytest.raises(UserError, match=r"prompts\.train \(rows from Python\)"):
        compared(rows("a", source=None), rows("b", source=None), place)
    # named anew, as the message says: that is told with the recipe's changes
    assert compared(rows("a"), rows("b", source="/x/b.txt"), place) == []
    none = {"prompts.train": of_rows(None, [])}
    assert compared(none, rows("b", source=None), place) == []
    assert compared(rows("b", source=None), none, place) == []


def test_another_file_of_a_reward_is_told(tmp_path: Path) -> None:
    had, here = ({"rewards.mine": of_file(one)} for one in ("a" * 64, "b" * 64))
    (told,) = compared(had, here, tmp_path)
    assert told.startswith("warning: rewards.mine: the file of this reward")
    assert compared(had, had, tmp_path) == compared(had, {}, tmp_path) == []
