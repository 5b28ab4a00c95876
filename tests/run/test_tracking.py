"""The run folder, the progress line and the pictures."""

import io
import json
import math

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console

from dgpo.errors import UserError
from dgpo.recipe import Recipe
from dgpo.run.pictures import before_after, grid, thumbnail
from dgpo.run.progress import Progress
from dgpo.run.tracking import Tracker, evaluation_row, read_jsonl, refuse_existing_run


@pytest.fixture
def recipe(tmp_path):
    return Recipe.load("pocket-geneval", [f"run.dir={tmp_path / 'run'}"])


def row(iteration, **more):
    return {"iteration": iteration, "reward_mean": 0.5, "loss": 0.1, "seconds": 2.0, **more}


def report(overall):
    return {
        "benchmark": "pocket-geneval",
        "overall": overall,
        "categories": {"colors": overall, "position": overall - 0.1},
        "rewards": {"pocket_geneval_strict": overall},
        "n": 660,
        "ci95": [overall - 0.03, overall + 0.03],
    }


def test_metrics_are_one_object_a_line_and_finite(recipe):
    with Tracker(recipe) as tracker:
        tracker.log(row(1, clipped=torch.tensor(0.25), rewards={"a": np.float32(0.5)}))
        tracker.log(row(2, loss=math.nan))
        lines = (tracker.folder / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["iteration"] for line in lines] == [1, 2]
        first, second = tracker.rows
    assert first["clipped"] == 0.25 and first["rewards"] == {"a": 0.5}
    assert second["loss"] is None
    resolved = yaml.safe_load((tracker.folder / "recipe.yaml").read_text())
    assert Recipe.from_dict(resolved) == recipe


def test_a_folder_with_a_run_is_refused_with_both_ways_out(recipe):
    with Tracker(recipe) as tracker:
        tracker.log(row(1))
    for attempt in (lambda: Tracker(recipe), lambda: refuse_existing_run(recipe.run.dir)):
        with pytest.raises(UserError) as error:
            attempt()
        for word in ("already holds a run (1 iterations)", "--resume", "run.dir=", recipe.run.dir):
            assert word in str(error.value)


def test_a_file_or_an_empty_folder_in_its_place(recipe, tmp_path):
    refuse_existing_run(tmp_path)  # exists, but holds no run
    with pytest.raises(UserError, match="no run to resume"):
        Tracker(recipe, resume_after=3)
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="is a file"):
        Tracker(recipe)


def test_resuming_drops_what_came_after_and_a_line_cut_short(recipe):
    with Tracker(recipe) as tracker:
        for iteration in range(1, 6):
            tracker.log(row(iteration, value=iteration / 3))
        tracker.evaluation(evaluation_row(2, 4.0, report(0.6)))
        tracker.evaluation(evaluation_row(4, 8.0, report(0.7)))
    metrics = tracker.folder / "metrics.jsonl"
    kept = metrics.read_bytes().splitlines(keepends=True)[:3]
    with metrics.open("a") as stream:
        stream.write('{"iteration": 6, "rew')
    with Tracker(recipe, resume_after=3) as tracker:
        assert metrics.read_bytes() == b"".join(kept)
        (said,) = tracker.lost
        assert str(metrics) in said and 'cut short and is left out: {"iteration": 6, "rew' in said
        assert [e["iteration"] for e in tracker.evaluations] == [2]
        tracker.log(row(4))
    assert [r["iteration"] for r in read_jsonl(metrics)] == [1, 2, 3, 4]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    file = tmp_path / "m.jsonl"
    file.write_text('{"a": 1}\n{"a": \n{"a": 3}\n')
    with pytest.raises(UserError, match="line 2"):
        read_jsonl(file)


@pytest.mark.parametrize(
    "line",
    [
        b"3", b"null", b"[]", b"\xff\xfe", b"\x00\x00", b"{", b"[" * 100_000, b'{"loss": 1}',
        b'{"iteration": "2", "reward_mean": 1, "loss": 1, "seconds": 1}',
    ],
)  # fmt: skip
@pytest.mark.parametrize("last", [False, True])
def test_a_damaged_line_is_named_and_nothing_is_thrown_away(recipe, line, last):
    with Tracker(recipe) as tracker:
        tracker.log(row(1))
        tracker.log(row(2))
    metrics = tracker.folder / "metrics.jsonl"
    first, second = metrics.read_bytes().splitlines()
    content = b"\n".join([first, second, line] if last else [first, line, second]) + b"\n"
    metrics.write_bytes(content)
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        Tracker(recipe, resume_after=2)
    assert metrics.read_bytes() == content


def test_rows_that_are_gone_are_told_of(recipe):
    with Tracker(recipe) as tracker:
        for iteration in (1, 2, 4):
            tracker.log(row(iteration))
    metrics = tracker.folder / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes().rstrip(b"\n"))  # whole but for its end
    with Tracker(recipe, resume_after=4) as tracker:
        assert tracker.lost == [f"{metrics} has no row of 1 earlier iterations: 3"]
        tracker.log(row(5))
        assert [r["iteration"] for r in tracker.rows] == [1, 2, 4, 5]
    (tracker.folder / "warnings.jsonl").write_text('{"iteration": 1}\n')
    with pytest.raises(UserError, match=r"warnings\.jsonl: row 1 .*without warning"):
        Tracker(recipe, resume_after=4)


def test_events_hold_the_same_figures(recipe):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Tracker(recipe) as tracker:
        tracker.log(row(1, reward_mean=0.25))
        tracker.evaluation(evaluation_row(0, 0.0, report(0.6)))
    events = EventAccumulator(str(tracker.folder / "tensorboard"))
    events.Reload()
    assert events.Scalars("train/reward_mean")[0].value == 0.25
    assert events.Scalars("eval/categories/position")[0].value == pytest.approx(0.5)


def test_card_curve_and_grids_tell_what_was_measured(recipe):
    reds = [Image.new("RGB", (32, 32), "red")] * 4
    blues = [Image.new("RGB", (32, 32), "blue")] * 4
    captions = ["a photo of a red circle"] * 4
    with Tracker(recipe) as tracker:
        tracker.evaluation(evaluation_row(0, 0.0, report(0.612)))
        tracker.grid("before", blues, captions)
        for iteration in range(1, 41):
            tracker.log(row(iteration, seconds=30.0 * iteration))
        tracker.evaluation(evaluation_row(40, 1200.0, report(0.934)))
        tracker.compare(blues, reds, captions)
        tracker.summarize()
    card = (tracker.folder / "README.md").read_text()
    matter = yaml.safe_load(card.split("---")[1])
    assert matter["library_name"] == "diffusers" and "lora" in matter["tags"]
    for text in (
        "**0.612**",
        "**0.934**",
        "20.0 minutes",
        "0.934 [0.904, 0.964]",
        "| position | 0.512 | 0.834 |",
        "660 held-out prompts",
        "load_lora_weights",
        "40 iterations of 8 groups of 16 images (5120 in all)",
        "curve.png",
        "samples/before_after.png",
    ):
        assert text in card
    with Image.open(tracker.folder / "curve.png") as curve:
        assert curve.width > 800 and np.asarray(curve.convert("L")).std() > 5
    with Image.open(tracker.folder / "samples" / "before_after.png") as pairs:
        colors = {color for _, color in pairs.convert("RGB").getcolors(1 << 16)}
    assert {(255, 0, 0), (0, 0, 255)} <= colors


def test_a_run_without_evaluation_still_has_a_card(recipe):
    with Tracker(recipe) as tracker:
        tracker.summarize()
        assert "Nothing was evaluated" in (tracker.folder / "README.md").read_text()
        tracker.log(row(1))
        tracker.summarize()
    assert (tracker.folder / "curve.png").exists()


def test_small_pictures_are_enlarged_by_whole_pixels():
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    big = np.asarray(thumbnail(Image.fromarray(pixels), 160))
    assert big.shape == (160, 160, 3)
    assert (big.reshape(32, 5, 32, 5, 3) == pixels[:, None, :, None]).all()
    wide = np.asarray(thumbnail(Image.new("RGB", (400, 100), "black"), 160))
    assert (wide == 0).all(-1).sum() == 160 * 40


def test_grids_have_a_cell_for_every_picture():
    captions = ["a long caption that has to be cut into lines " * 3] * 5
    sheet = grid([Image.new("RGB", (32, 32), "red")] * 5, captions)
    red = (np.asarray(sheet) == (255, 0, 0)).all(-1).sum()
    assert red == 5 * 160 * 160
    wide = grid([Image.new("RGB", (48, 16), "red")] * 5, captions)
    assert wide.height < sheet.height  # no room is kept for a square
    with pytest.raises(ValueError, match="5 pictures and 4 captions"):
        grid([Image.new("RGB", (32, 32))] * 5, captions[:4])
    with pytest.raises(ValueError, match="shorter"):
        before_after([Image.new("RGB", (32, 32))] * 2, [Image.new("RGB", (32, 32))], captions[:2])


FIGURES = {"reward": 0.6161, "spread": 0.875, "clipped": 0.02, "samples_per_second": 55.04}


def test_progress_is_plain_lines_when_not_at_a_terminal():
    out, time = io.StringIO(), [0.0]
    console = Console(file=out, force_terminal=False, width=40)
    with Progress(100, console=console, every=10, now=lambda: time[0]) as progress:
        for done, time[0] in ((1, 0.0), (2, 4.0), (3, 12.0)):
            progress.stage("rollout")
            progress.iteration(done, trained_seconds=2.0 * done, **FIGURES)
        progress.say("evaluated: 0.61 [0.58, 0.64]")
    lines = out.getvalue().splitlines()
    assert lines == [
        "iteration 1/100  reward 0.616  spread 88%  clipped 2%  55.0 samples/s  3:18 left",
        "iteration 3/100  reward 0.616  spread 88%  clipped 2%  55.0 samples/s  3:14 left",
        "evaluated: 0.61 [0.58, 0.64]",
    ]


def test_time_left_is_the_sooner_of_iterations_and_minutes():
    out = io.StringIO()
    console = Console(file=out, force_terminal=False)
    with Progress(1000, max_minutes=15, console=console) as progress:
        progress.iteration(10, trained_seconds=100.0, **FIGURES)
    assert "13:20 left" in out.getvalue()


def test_progress_is_one_live_line_at_a_terminal():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    with Progress(10, console=console) as progress:
        progress.stage("training")
        progress.iteration(3, trained_seconds=3.0, **FIGURES)
    assert "training" in out.getvalue() and "iteration 3/10" in out.getvalue()
