"""dgpo compare: its figures and bounds, what it refuses, and one small comparison as a whole."""

import json
import math
from pathlib import Path
from shutil import rmtree

import pytest
import yaml
from typer.testing import CliRunner

import dgpo.cli.commands as cli
from dgpo.comparison import race
from dgpo.comparison import runs as comparison_runs
from dgpo.comparison.figures import Figure, mean, ratio, read_record, summarize, to_target
from dgpo.comparison.plan import lag, plan
from dgpo.comparison.results_store import keep
from dgpo.comparison.runs import arrived, state
from dgpo.comparison.table import cell, notes, tables
from dgpo.errors import UserError
from dgpo.recipe import Recipe
from tiny_runs import PROMPTS, light, settings

METRICS = ["brightness", "redness"]


def compare(*arguments: str, code: int = 0):
    result = CliRunner().invoke(cli.app, ["compare", *arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


@pytest.fixture
def write_recipe(tmp_path, monkeypatch):
    """Writes NAME.yaml into the folder one stands in; sections of a change replace others."""
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("\n".join(PROMPTS))

    def write(name: str, model: str = "families.tiny:sd3_small", **changes) -> str:
        prompts = {"train": "prompts.txt", "eval": "prompts.txt"}
        evaluation = {"every": 1, "at_start": True, "metrics": METRICS}
        recipe = settings(
            model=model, rewards={"brightness": 1.0}, prompts=prompts, eval=evaluation
        )
        recipe = {**recipe, **changes, "algorithm": {"name": "dgpo", "timesteps": {"count": 1}}}
        recipe["algorithm"]["timesteps"]["indices"] = [0, 2]
        recipe["algorithm"] |= changes.get("algorithm", {})
        Path(f"{name}.yaml").write_text(yaml.safe_dump(recipe))
        return f"{name}.yaml"

    return write


def write_run(run, scores, seconds=60.0, forwards=100, last=None):
    """A run folder with an evaluation after each iteration, the first of the base model."""
    run.folder.mkdir(parents=True)
    (run.folder / "recipe.yaml").write_text(run.recipe.to_yaml())
    rows, evaluations = [], []
    for n, score in enumerate(scores):
        rewards = {"brightness": score, "redness": 0.5 - 0.1 * score}
        evaluations.append(
            {"iteration": n, "seconds": n * seconds, "overall": score, "rewards": rewards}
        )
        if n:
            counts = {"images": 8 * n, "forwards": forwards * n, "backwards": 16 * n}
            times = {"seconds": n * seconds, "seconds_iteration": seconds}
            rows.append({"iteration": n, **times, **counts})
    for name, lines in (("metrics", rows[:last]), ("evaluations", evaluations)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (run.folder / f"{name}.jsonl").write_text(text)


@pytest.fixture
def races(write_recipe):
    """Two recipes, two seeds, of three iterations; the second seed of the slow one is too slow."""
    train = {"iterations": 3}
    sources = [write_recipe("fast", train=train), write_recipe("slow", train=train)]
    runs = plan(sources, 2, Path("out"))
    assert [(run.name, run.seed) for run in runs] == [
        ("fast", 0),
        ("slow", 0),
        ("fast", 1),
        ("slow", 1),
    ]
    write_run(runs[0], [0.2, 0.8, 0.9, 0.85])
    write_run(runs[1], [0.2, 0.3, 0.4, 0.8], seconds=600)
    write_run(runs[2], [0.2, 0.6, 0.8, 0.95], seconds=90)
    write_run(runs[3], [0.2, 0.3, 0.4, 0.5], seconds=600)
    return sources, runs


def test_the_interval_is_students():
    found = mean([1.0, 2.0, 3.0])
    half = 4.302652729911275 / math.sqrt(3)
    assert (found.value, found.seeds) == (2.0, 3)
    assert found.low == pytest.approx(2 - half) and found.high == pytest.approx(2 + half)
    assert mean([5.0]) == Figure(5.0, seeds=1)  # of one seed there is no interval
    assert mean([]).value is None
    assert mean([0.0, 1.0, 0.0], least=0).low == 0
    assert mean([1.0, 0.0]) == Figure(0.5, 0.0, 1.0, seeds=2)  # of two they are the two


def test_costs_ratios_and_bounds(races):
    fast, slow = (
        [read_record(run.folder, run.seed) for run in races[1] if run.name == name]
        for name in ("fast", "slow")
    )
    there = to_target(fast, 0.8, "minutes")  # after 1 minute, and after 2 times 1.5
    assert (there.value, there.bound, there.arrived) == (2.0, "exact", 2)
    assert (there.low, there.high) == (1, 3)
    assert to_target(fast, 0.8, "images").value == 12
    assert to_target(fast, 0.8, "forwards").value == 150
    assert to_target(fast, 0.2, "minutes").value == 0  # the base model is there already

    late = to_target(slow, 0.8, "minutes")  # 30 minutes, and not within 30
    assert (late.value, late.bound, late.arrived, late.low) == (30.0, "at least", 1, None)
    above = ratio(slow, fast, 0.8, "minutes")
    assert above.value == pytest.approx(math.sqrt(30 * 10)) and above.bound == "at least"
    below = ratio(fast, slow, 0.8, "minutes")
    assert below.value == pytest.approx(1 / math.sqrt(300)) and below.bound == "at most"
    assert ratio(slow, slow, 0.8, "minutes").value is None  # of two bounds nothing follows
    assert ratio(fast, fast, 0.2, "minutes").value is None  # nor of no cost at all
    exact = ratio(slow, fast, 0.4, "minutes")
    assert exact.value == pytest.approx(math.sqrt(20 * 20 / 1.5)) and exact.bound == "exact"
    assert exact.value and exact.low and exact.low < exact.value


def test_scores_and_changes_of_the_other_metrics(races):
    records = [read_record(run.folder, run.seed) for run in races[1] if run.name == "fast"]
    (summary,) = summarize({"fast": ("dgpo", records)}, [])
    assert summary.best.value == pytest.approx((0.9 + 0.95) / 2)
    # at the evaluation with the best score, against the base model's
    assert summary.change["redness"].value == pytest.approx(-0.1 * (0.7 + 0.75) / 2)
    table, iteration = tables([summary], "brightness")
    assert table.header[-1] == "change of redness" and table.rows[0][-1].startswith("-0.07")
    # medians of 60 s and 90 s; sampling was not noted; counts are those of one iteration
    row = dict(zip(iteration.header, iteration.rows[0], strict=True))
    assert (row["seconds"], row["rollouts"], row["images"]) == ("75.0", "not known", "8.00")
    assert (row["denoiser forwards"], row["denoiser backwards"]) == ("100", "16.0")


def test_what_a_run_did_not_count_is_not_known(races):
    run = races[1][0]
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    old = [{k: row[k] for k in ("iteration", "seconds")} for row in rows]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in old))
    record = read_record(run.folder, 0)
    assert to_target([record], 0.8, "minutes").value == 1
    assert to_target([record], 0.8, "forwards").value is None
    assert cell(to_target([record], 0.8, "forwards")) == "not known"


@pytest.mark.parametrize(
    ("figure", "text"),
    [
        (Figure(12.345), "12.3"),
        (Figure(1234567.0), "1,230,000"),
        (Figure(2.0, 1.0, 3.0), "2.00 [1.00, 3.00]"),
        (Figure(0.0), "0.00"),
        # a bound is never rounded to more than is known
        (Figure(19.99, bound="at least"), ">= 19.9"),
        (Figure(0.1001, bound="at most"), "<= 0.101"),
        (Figure(90.0, bound="at least", seeds=2, arrived=0), ">= 90.0 (0 of 2 arrived)"),
        (Figure(None), "not known"),
    ],
)
def test_a_figure_as_text(figure, text):
    assert cell(figure) == text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"eval": {"metrics": ["redness"]}}, "eval.metrics: a has ['brightness', 'redness']"),
        ({"eval": {"metrics": METRICS, "steps": 7}}, "eval.steps: a has 3, b has 7"),
        ({"prompts": {"train": "prompts.txt", "eval": "other.txt"}}, "prompts.eval"),
        ({"rollout": {"steps": 5, "call": {"height": 16, "width": 16}}}, "eval.steps"),
    ],
)
def test_what_cannot_be_compared_is_refused(changes, words, write_recipe):
    sources = [write_recipe("a"), write_recipe("b", **changes)]
    with pytest.raises(UserError, match="cannot be compared") as error:
        plan(sources, 1, Path("out"))
    assert words in str(error.value)


def test_mistakes_are_refused_before_anything_is_trained(write_recipe):
    a = write_recipe("a")
    for arguments, words in (
        ([a, a], "named twice"),
        ([a, "seed=3"], "--seeds"),
        ([a, "run.dir=x"], "--out"),
        ([a, "train.max_minutes=3", "--budget", "5"], "--budget"),
        ([a, "--stop-at-target"], "--target"),
        ([a, "--budget", "-1"], "--budget"),
        (["train.lr=1"], "name a recipe"),
        ([a, "prompts.eval=null"], "prompts.eval is missing"),
    ):
        assert words in compare(*arguments, code=2).stderr
    assert not Path("runs").exists()


def test_a_run_by_another_recipe_is_refused_and_a_larger_budget_goes_on(races):
    sources, _ = races
    (other,) = [r for r in plan(sources, 1, Path("out"), 99, ["train.lr=7"]) if r.name == "fast"]
    with pytest.raises(UserError, match=r"another recipe .*:\n  train.lr: 0.0003 -> 7.0\n"):
        state(other, None)
    short = plan(sources, 1, Path("out"), budget=0.5)[0]
    with pytest.raises(UserError, match=r"3.0 minutes, more than the 0.5 of the budget"):
        state(short, None)
    assert state(plan(sources, 1, Path("out"), budget=3)[0], None) == "finished"
    assert state(plan(sources, 3, Path("out"))[-1], None) == "new"


def test_a_run_that_stopped_at_a_target_goes_on_to_a_higher_one(write_recipe):
    (run,) = plan([write_recipe("a", train={"iterations": 9})], 1, Path("out"))
    write_run(run, [0.2, 0.7, 0.8])
    assert state(run, 0.7) == "finished"
    assert state(run, 0.8) == state(run, None) == "interrupted"
    assert not arrived([{"overall": 0.9}], 0.8)
    # a run that the trainer itself ended, for a reason of its own, is not begun again
    (run.folder / comparison_runs.ENDED).write_text("2")
    assert state(run, None) == "finished"


def test_the_files_are_written_from_runs_that_are_there(races, monkeypatch):
    sources, _ = races

    def no_training(*args):
        raise AssertionError("a finished run was trained again")

    monkeypatch.setattr(race, "Trainer", no_training)
    output = compare(*sources, "--seeds", "2", "--target", "0.8", "--out", "out").output
    assert output.count("found finished") == 4
    out = Path("out")
    text = (out / "table.md").read_text()
    assert ">= 30.0 (1 of 2 arrived)" in text and ">= 17.3" in text and "2.00 [1.00, 3.00]" in text
    body = json.loads((out / "table.json").read_text())
    assert [recipe["name"] for recipe in body["recipes"]] == ["fast", "slow"]
    assert body["recipes"][1]["ratio_to_first"]["0.8"]["minutes"]["bound"] == "at least"
    assert body["recipes"][0]["to_target"]["0.8"]["images"]["value"] == 12
    page = (out / "compare.html").read_text()
    assert 'src="data:image/png;base64,' in page and "http" not in page and "torch" in page
    commands = (out / "commands.txt").read_text()
    assert "dgpo compare fast.yaml slow.yaml --seeds 2 --target 0.8 --out out\n" in commands
    assert "dgpo train slow.yaml seed=1 run.dir=out/slow-seed1\n" in commands
    assert (out / "compare.png").stat().st_size > 10_000


def test_every_file_can_be_made_again_from_what_was_kept(races, monkeypatch):
    sources, runs = races
    start = {"iteration": 0, "command": ["/home/me/dgpo"], "machine": {}}
    start["machine"] = {"processor": "abacus", "system": "Linux-6.1-of-my-firm"}
    for run in runs:
        (run.folder / "run.json").write_text(json.dumps({"starts": [start]}))
        keep(run, Path("results"))
    monkeypatch.setattr(race, "Trainer", None)  # nothing is trained
    asked = [*sources, "--seeds", "2", "--target", "0.8", "--redraw"]
    compare(*asked, "--out", "out")
    output = compare(*asked, "--out", "again", "--results", "results").output
    assert "slow, seed 1: taken from results" in output
    first, again = (json.loads(Path(out, "table.json").read_text()) for out in ("out", "again"))
    assert again["recipes"] == first["recipes"]
    assert again["machines"] == [{"processor": "abacus", "system": "Linux"}]
    assert Path("again/compare.png").stat().st_size > 10_000
    assert "fast 2 (less at first), slow 2 (less at first)." in Path("again/table.md").read_text()
    assert "settings of these runs were not kept" not in Path("again/table.md").read_text()
    assert state(plan(sources, 2, Path("again"))[3], 0.8) == "finished"
    kept = "".join(file.read_text() for file in Path("results").iterdir())
    assert "/home/me" not in kept and "out/slow" not in kept
    # its settings are known, so another recipe's is refused
    words = compare(*asked, "train.lr=7", "--out", "x", "--results", "results", code=2).stderr
    assert "a run by another recipe" in words


def test_metrics_that_were_kept_without_their_recipe_are_drawn_and_said_so(races):
    sources, runs = races
    keep(runs[0], Path("results"))
    for name in ("recipe.yaml", "run.json"):
        Path(f"results/fast-seed0-{name}").unlink(missing_ok=True)
    asked = [sources[0], "--target", "0.8", "--redraw", "--results", "results", "--out", "again"]
    compare(*asked)
    text = Path("again/table.md").read_text()
    assert "The settings of these runs were not kept: fast seed 0." in text and "1.00" in text
    assert "lags behind the policy" not in text  # by how much is not known
    cut = Path("results/fast-seed0-metrics.jsonl")
    cut.write_text("".join(cut.read_text().splitlines(keepends=True)[:-1]))
    words = compare(*asked[:-1], "cut", code=2).stderr
    assert "has no iteration 3, the last of fast-seed0-evaluations.jsonl" in words
    Path("results/fast-seed0-metrics.jsonl").unlink()
    words = compare(*asked[:-1], "more", code=2).stderr
    assert "fast-seed0-metrics.jsonl is missing" in words and not Path("more").exists()
    empty = compare(sources[1], "--redraw", "--out", "none", code=2).stderr
    assert "there is no run to draw in none" in empty


def test_the_lag_of_what_is_scored_is_in_iterations(write_recipe):
    timesteps = {"timesteps": {"count": 2, "indices": [0, 2]}}
    ema = {"ema": {"decay": 0.95, "every": 2}}
    one = Recipe.load(write_recipe("one", **ema))
    two = Recipe.load(
        write_recipe("two", algorithm=timesteps, train={"optimizer_step": "timestep"}, **ema)
    )
    assert (lag(one), lag(two)) == (pytest.approx(40), pytest.approx(20))


def test_what_is_not_finished_is_said(races):
    _, runs = races
    records = [read_record(run.folder, run.seed, run.seed == 0) for run in runs[:3:2]]
    assert "Not finished: fast seed 1." in notes(summarize({"fast": ("dgpo", records)}, [0.8]))


def test_from_end_to_end(write_recipe, monkeypatch):
    light(monkeypatch)
    sources = [
        write_recipe("ours"),
        write_recipe("theirs", algorithm={"name": "awm"}, checkpoint={"every": 1}),
    ]
    command = [*sources, "--target", "0.99", "--out", "out", "--results", "results"]

    def stops(self, state, control):
        if state.recipe.algorithm.name == "awm" and state.iteration == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(race.StopAtScore, "on_iteration_begin", stops)
        assert "the same command goes on" in compare(*command, code=130).stderr
    assert "Not finished: theirs seed 0." in Path("out/table.md").read_text()
    ours = Path("out/ours-seed0/metrics.jsonl")
    written = ours.stat().st_mtime_ns
    # as a kill leaves it in the middle of the writing of a first checkpoint
    theirs = Path("out/theirs-seed0")
    (theirs / "checkpoints/00000001").rename(theirs / "checkpoints/00000001.new")
    (theirs / "checkpoints/00000001.new/manifest.json").unlink()
    rmtree(theirs / "lora")

    output = compare(*command).output
    assert "[1/2] ours, seed 0: found finished" in output and "[2/2] theirs" in output
    body = json.loads(Path("out/table.json").read_text())
    for recipe in body["recipes"]:
        (run,) = recipe["runs"]
        assert run["finished"] and [e["iteration"] for e in run["evaluations"]] == [0, 1, 2]
        assert recipe["to_target"]["0.99"]["minutes"]["bound"] == "at least"
        assert run["evaluations"][-1]["cost"]["images"] == 16
        assert run["evaluations"][-1]["cost"]["forwards"] > 16 * 3
    kept = {file.name for file in Path("results").iterdir()}
    names = ("recipe.yaml", "run.json", "metrics.jsonl", "evaluations.jsonl")
    assert kept == {f"{run}-seed0-{name}" for run in ("ours", "theirs") for name in names}
    assert len(body["machines"]) == 1 and body["machines"][0]["torch_threads"] >= 1

    compare(sources[0], "--target", "0.01", "--stop-at-target", "--out", "early")
    (recipe,) = json.loads(Path("early/table.json").read_text())["recipes"]
    assert [e["iteration"] for e in recipe["runs"][0]["evaluations"]] == [0, 1]

    monkeypatch.setattr(race, "Trainer", None)  # nothing is left to train
    assert compare(*command).output.count("found finished") == 2
    assert ours.stat().st_mtime_ns == written
