"""What a run has measured, damaged at random: it goes on with what is there, or one clear error."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgpo.recipe import Recipe
from dgpo.run.manifest import record_start
from dgpo.run.tracking import Tracker
from fuzz.parts import PROFILE, changed_bytes, value_or_error
from tiny_runs import light

ROWS = {
    "metrics.jsonl": {"reward_mean": 0.5, "loss": None, "seconds": 1.0},
    "evaluations.jsonl": {"seconds": 1.0, "overall": 0.5, "rewards": {"a": 0.5}},
    "warnings.jsonl": {"warning": "caf\u00e9 \u2028 {"},
}
LAST = 2


def written(row: dict) -> bytes:
    lines = [json.dumps({"iteration": n, **row}, ensure_ascii=False) for n in range(1, LAST + 2)]
    return ("\n".join(lines) + "\n").encode()


@pytest.mark.parametrize("name", [*ROWS, "run.json"])
@PROFILE
@given(data=st.data())
def test_damaged_files_of_a_run(
    name: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "damaged-run"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "recipe.yaml").touch()
    contents = {file: written(row) for file, row in ROWS.items()}
    contents["run.json"] = json.dumps({"starts": [{"iteration": 0}]}).encode()
    contents[name] = data.draw(changed_bytes(contents[name]))
    for file, content in contents.items():
        (folder / file).write_bytes(content)
    recipe = Recipe.from_dict({"run": {"dir": str(folder)}})
    with pytest.MonkeyPatch.context() as patch:
        light(patch)
        patch.setattr("dgpo.run.manifest.facts", dict)
        tracker = value_or_error(lambda: Tracker(recipe, resume_after=LAST))
        value_or_error(lambda: record_start(folder, 0, LAST))
    if tracker is None:
        assert (folder / name).read_bytes() == contents[name]  # nothing is thrown away
        return
    assert all(row["iteration"] <= LAST for row in (*tracker.rows, *tracker.evaluations))
    iterations = {row["iteration"] for row in tracker.rows}
    missing = set(range(1, LAST + 1)) - iterations
    assert not missing or any("has no row of" in text for text in tracker.lost)
    assert Path(tracker.folder / "metrics.jsonl").read_bytes().endswith(b"\n") or not iterations
