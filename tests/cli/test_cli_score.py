"""`dgpo score` and `dgpo list rewards`."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import dgpo.cli.commands as cli
from dgpo.registry import REWARDS
from hostile_pictures import png_header


def run(*arguments, code=0):
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "pictures"
    place.mkdir()
    for name, color in (("b.png", "blue"), ("a.jpg", "red"), ("c.webp", "white")):
        Image.new("RGB", (8, 8), color).save(place / name, quality=100)
    (place / "notes.txt").write_text("no picture")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a [red] one\na blue one\na white one\n")
    return place, prompts


def test_scores_are_printed_and_written(folder, tmp_path):
    place, prompts = folder
    out = tmp_path / "new" / "scores.jsonl"
    common = ["score", "--images", place, "--prompts", prompts, "--json", out]
    output = run(*common, "--reward", "redness", "--reward", "brightness", "--batch", "2").output
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["image"].rsplit("/")[-1] for row in rows] == ["a.jpg", "b.png", "c.webp"]
    assert [row["prompt"] for row in rows] == ["a [red] one", "a blue one", "a white one"]
    redness = [row["scores"]["redness"] for row in rows]
    assert redness == pytest.approx([1.0, -0.5, 0.0], abs=0.02)
    assert rows[2]["scores"]["brightness"] == pytest.approx(1.0, abs=0.01)
    for word in ("picture", "redness", "a.jpg", "a [red] one", "-0.5000", "mean", "std"):
        assert word in output


def test_pictures_meet_their_rows_as_people_count(tmp_path):
    place = tmp_path / "pictures"
    place.mkdir()
    shades = {"1.png": 10, "2.png": 20, "10.png": 100, "11.png": 110}
    for name, shade in shades.items():
        Image.new("L", (8, 8), shade).save(place / name)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"shade {shade}" for shade in shades.values()))
    out = tmp_path / "scores.jsonl"
    common = ["score", "--reward", "brightness", "--prompts", prompts, "--json", out]
    run(*common, "--images", place)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["image"].rsplit("/")[-1] for row in rows] == list(shades)
    scores = {row["prompt"]: row["scores"]["brightness"] for row in rows}
    assert scores == pytest.approx({f"shade {n}": n / 255 for n in shades.values()})


def test_a_picture_of_16_bits_and_one_that_is_too_large(tmp_path):
    Image.fromarray(np.full((8, 8), 32768, np.uint16)).save(tmp_path / "grey.png")
    (tmp_path / "bomb.png").write_bytes(png_header(30_000, 30_000))
    (tmp_path / "one.txt").write_text("a")
    out = tmp_path / "scores.jsonl"
    common = ["score", "--reward", "brightness", "--prompts", tmp_path / "one.txt", "--json", out]
    run(*common, "--images", tmp_path / "grey.png")
    assert json.loads(out.read_text())["scores"]["brightness"] == pytest.approx(128 / 255)
    said = run(*common, "--images", tmp_path / "bomb.png", code=2).stderr
    assert f"--images {tmp_path / 'bomb.png'}: too large" in said and "178956970" in said


@pytest.mark.parametrize("place", ["folder", "file/below.jsonl"])
def test_where_scores_cannot_be_written_is_said_before_they_are_paid_for(folder, tmp_path, place):
    pictures, prompts = folder
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    common = ["score", "--reward", "no.such:reward", "--images", pictures, "--prompts", prompts]
    assert f"--json {tmp_path / place}:" in run(*common, "--json", tmp_path / place, code=2).stderr


def test_one_picture_and_one_prompt_for_all(folder, tmp_path):
    place, _ = folder
    one = tmp_path / "one.jsonl"
    one.write_text('{"prompt": "a"}\n')
    run("score", "--reward", "redness", "--images", place, "--prompts", one)
    output = run("score", "--reward", "redness", "--images", place / "b.png", "--prompts", one)
    assert "-0.5000" in output.output and "std" not in output.output


def test_what_cannot_be_scored(folder, tmp_path):
    place, prompts = folder
    empty = tmp_path / "empty"
    empty.mkdir()
    few = tmp_path / "few.txt"
    few.write_text("a\nb\n")
    (tmp_path / "broken.png").write_bytes(b"no")
    one = tmp_path / "one.txt"
    one.write_text("a\n")
    for images, rows, reward, word in (
        (tmp_path / "none", prompts, "redness", "no such folder"),
        (empty, prompts, "redness", "no picture in it"),
        (place, few, "redness", "3 pictures and 2 prompts"),
        (place, prompts, "rednes", "did you mean 'redness'"),
        (tmp_path / "broken.png", one, "redness", "is no picture"),
        (place, prompts, "geneval", "include = None"),
    ):
        arguments = ["--reward", reward, "--images", images, "--prompts", rows]
        assert word in run("score", *arguments, code=2).stderr


def test_list_rewards_says_what_is_ready(monkeypatch):
    monkeypatch.delenv("DGPO_JUDGE_URL", raising=False)
    lines = run("list", "rewards").output.splitlines()
    table = {line.split()[0]: line for line in lines if line.strip()}
    assert " yes " in table["clip"] and "15 to 40" in table["clip"] and "MIT" in table["clip"]
    assert " yes " in table["hpsv3"] and "17 GB" in table["hpsv3"]
    at = table["reward"].index("downloads")
    found = {name: line[at:].strip() for name, line in table.items()}
    assert found["clip"] == "1.7 GB" and found["redness"] == found["ocr"] == ""
    assert found["vlm_judge"] == found["unified_reward"] == "none: served"
    assert {name for name, said in found.items() if said.endswith("GB")} == {
        name for name, entry in REWARDS.items() if entry.weights.endswith("GB")
    }
    assert "export DGPO_JUDGE_URL=URL" in table["vlm_judge"]
    assert "ready" in lines[-1]
    monkeypatch.setenv("DGPO_JUDGE_URL", "http://localhost:1")
    again = run("list", "rewards").output.splitlines()
    assert any(line.startswith("vlm_judge") and " yes " in line for line in again)


def test_list_rewards_does_not_wait_for_torch():
    code = (
        "import sys\nfrom dgpo.cli import app\n"
        "try: app(['list', 'rewards'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'diffusers', 'transformers', 'httpx'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_eval_of_geneval_wants_its_prompts():
    arguments = ["eval", "--model", "none", "--benchmark"]
    assert "give its file by --prompts" in run(*arguments, "geneval", code=2).stderr
    more = ["pocket-geneval", "--prompts", "x.txt"]
    assert "has its own prompts" in run(*arguments, *more, code=2).stderr
