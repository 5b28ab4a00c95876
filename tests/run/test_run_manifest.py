"""run.json: what a run was made with; and what ``--resume`` is given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dgpo.errors import UserError
from dgpo.recipe.files import apply_overrides, resumed
from dgpo.run.manifest import facts, record_start


def test_every_start_is_recorded(tmp_path: Path) -> None:
    record_start(tmp_path, seed=7, iteration=0)
    record_start(tmp_path, seed=7, iteration=5)
    first, second = json.loads((tmp_path / "run.json").read_text())["starts"]
    assert (first["iteration"], second["iteration"], second["seed"]) == (0, 5, 7)
    assert {"time", "command", "commit", "versions", "machine"} <= set(first)
    assert first["versions"]["torch"] and first["machine"]["cpus"]
    assert first["commit"] is None or len(first["commit"].removesuffix("+changes")) == 40
    for damaged in ("{", '{"starts": 3}', '{"starts": {}}', "[]", "null", "[" * 100_000, "\x00"):
        (tmp_path / "run.json").write_text(damaged)
        with pytest.raises(UserError, match=r"run\.json is damaged"):
            record_start(tmp_path, seed=7, iteration=9)
        assert (tmp_path / "run.json").read_text() == damaged


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (
            ["dgpo", "train", "a.yaml", "train.lr=1e-4"],
            ["dgpo", "train", "a.yaml", "train.lr=1e-4"],
        ),
        (["x", "--token", "abc", "y"], ["x", "--token", "***", "y"]),
        (["x", "--hf-token=abc"], ["x", "--hf-token=***"]),
        (["x", "rollout.call.api_key=abc"], ["x", "rollout.call.api_key=***"]),
        (["x", "model=hf_abc"], ["x", "model=***"]),
        (["x", "a.headers={Authorization: Bearer abc}"], ["x", "a.headers=***"]),
        (["x", "a.b=[{key: abc}]", "monkey=1"], ["x", "a.b=***", "monkey=1"]),
        (["x", "a.urls=[http://h, http://me:abc@h]"], ["x", "a.urls=***"]),
        (["x", "http://me:abc@h"], ["x", "***"]),
    ],
)
def test_secrets_stay_out(
    words: list[str], shown: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", words)
    assert facts()["command"] == shown


def test_what_resume_may_be_given(tmp_path: Path) -> None:
    run, empty = tmp_path / "run", tmp_path / "empty"
    for folder in (run, empty):
        folder.mkdir()
    (run / "recipe.yaml").write_text("")
    here = f"run.dir={run}"
    assert resumed("pocket", ["a.b=1"]) == ("pocket", ["a.b=1"])
    assert resumed("pocket", ["a.b=1", str(run)]) == ("pocket", ["a.b=1", here])
    assert resumed(str(run), []) == (str(run / "recipe.yaml"), [here])
    odd = [tmp_path / name for name in ("a #2", "2024", "a=b", "'q'")]
    for folder in odd:
        folder.mkdir()
        (folder / "recipe.yaml").write_text("")
        for words in ([str(folder)], ["a.b=1", str(folder)]):
            _, overrides = resumed("pocket", words)
            assert apply_overrides({}, overrides)["run"]["dir"] == str(folder)
    with pytest.raises(UserError, match=f"one run, got {run} and elsewhere"):
        resumed(str(run), ["run.dir=elsewhere"])
    with pytest.raises(UserError, match="holds no run"):
        resumed("pocket", [str(empty)])
    with pytest.raises(UserError, match="one run"):
        resumed(str(run), [str(run)])
