"""Loggers: what they are told, by which names, and what a failing one does to a run."""

import csv
import inspect
import json
import re
import signal
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from PIL import Image

from dgpo import registry
from dgpo.errors import MissingExtra, UserError, told
from dgpo.interrupts import Terminated
from dgpo.recipe import Recipe
from dgpo.run.jsonl import read_jsonl
from dgpo.run.loggers import Logger
from dgpo.run.tracking import Tracker, evaluation_row
from dgpo.training.routine import Outputs

OWN = """
from dgpo.run.loggers import Logger

calls = []

class Mine(Logger):
    def __init__(self, color="red"):
        self.color = color

    def begin(self, run):
        calls.append(("begin", self.color, run.name, run.id, run.resumed_after, run.config["seed"]))

    def scalars(self, values, step):
        calls.append(("scalars", values, step))

    def image(self, name, image, step):
        calls.append(("image", name, image.mode, step))

    def table(self, name, columns, rows, step):
        calls.append(("table", name, columns, rows, step))

    def end(self, failed):
        calls.append(("end", failed))

class NoLogger:
    pass
"""
REDS = [Image.new("RGB", (8, 8), "red")] * 2
CAPTIONS = ["a cat", "a dog"]


@pytest.fixture
def own(tmp_path):
    """The name of a logger in a file of the user's own, and the calls that it gets."""
    file = tmp_path / "own.py"
    file.write_text(OWN)
    name = f"{file}:Mine"
    kind = registry.resolve("logger", name)
    return name, sys.modules[kind.__module__].calls


def recipe(tmp_path, loggers, **more):
    run = {"dir": str(tmp_path / "run"), "loggers": loggers, **more.pop("run", {})}
    return Recipe.from_dict({"run": run, **more})


def row(iteration, **more):
    return {"iteration": iteration, "reward_mean": 0.5, "loss": 0.25, "seconds": 2.0, **more}


def report(overall):
    scores = {"overall": overall, "rewards": {"redness": overall}, "n": 4, "ci95": [0.0, 1.0]}
    return {"benchmark": None, "categories": {}, **scores}


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("wandb", ["wandb"]),
        (["csv", "jsonl"], ["csv", "jsonl"]),
        ({"wandb": {"project": "x"}, "csv": None}, [{"wandb": {"project": "x"}}, "csv"]),
        (["csv", {"wandb": {"tags": ["a"]}}], ["csv", {"wandb": {"tags": ["a"]}}]),
        ([{"csv": {}}], ["csv"]),
        ([], []),
        (None, []),
        ("none", []),
        ("mine.py:Mine", ["mine.py:Mine"]),
    ],
)
def test_a_name_or_several_with_options_or_without(tmp_path, given, kept):
    made = recipe(tmp_path, given)
    assert made.run.loggers == kept
    assert Recipe.from_dict(made.to_dict()) == made


def test_tensorboard_is_the_default():
    assert Recipe.from_dict({}).run.loggers == ["tensorboard"]
    overrides = ["run.loggers.wandb.project=mine"]
    assert Recipe.load("pocket-geneval", overrides).run.loggers == [{"wandb": {"project": "mine"}}]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("wandbb", ["run.loggers", "unknown logger 'wandbb'", "did you mean 'wandb'", "csv"]),
        (["csv", "csv"], ["run.loggers", "'csv' is named twice"]),
        ([3], ["run.loggers = [3]", "should hold names"]),
        ([["csv"]], ["run.loggers = [['csv']]", "should hold names"]),
        ({"wandb": "mine"}, ["run.loggers", "should hold names", "{wandb: {project: mine}}"]),
        ({"wandb": {"api_key": "abc"}}, ["run.loggers.wandb.api_key", "environment variable"]),
        ({"trackio": {"server_url": "http://me:pw@host"}}, ["run.loggers.trackio.server_url"]),
    ],
)
def test_what_is_no_logger_is_refused_with_the_way_out(tmp_path, given, words):
    with pytest.raises(UserError) as error:
        recipe(tmp_path, given)
    for word in words:
        assert word in str(error.value)
    for secret in ("abc", "pw@"):
        assert secret not in str(error.value)


def test_a_logger_of_ones_own_is_told_everything(tmp_path, own):
    name, calls = own
    made = recipe(tmp_path, {name: {"color": "blue"}}, seed=3, samples={"every": 2})
    with Tracker(made) as tracker:
        tracker.evaluation(evaluation_row(0, 0.0, report(0.5)))
        tracker.grid("before", REDS, CAPTIONS)
        rewards = {"redness": torch.tensor([0.5, float("nan")])}
        for iteration in (1, 2):
            tracker.table(iteration, {"prompt": CAPTIONS, **rewards})
            tracker.log(row(iteration, rewards={"a": torch.tensor(1.0)}, note="text", none=None))
        tracker.grid("000002", REDS, CAPTIONS)
        tracker.compare(REDS, REDS, CAPTIONS)
    figures = {"train/reward_mean": 0.5, "train/loss": 0.25, "train/seconds": 2.0}
    figures["train/rewards/a"] = 1.0
    run_id = json.loads((tmp_path / "run/loggers.json").read_text())["id"]
    assert len(run_id) == 8
    assert calls == [
        ("begin", "blue", "run", run_id, None, 3),
        ("scalars", {"eval/overall": 0.5, "eval/rewards/redness": 0.5, "eval/n": 4}, 0),
        ("image", "samples/grid", "RGB", 0),
        ("scalars", figures, 1),
        ("table", "rollouts", ["prompt", "redness"], [["a cat", 0.5], ["a dog", None]], 2),
        ("scalars", figures, 2),
        ("image", "samples/grid", "RGB", 2),
        ("image", "samples/before_after", "RGB", 2),
        ("end", False),
    ]


def test_the_logger_of_the_documentation(tmp_path, monkeypatch):
    page = Path(__file__).parents[2] / "docs/logging.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    (words,) = re.findall(r"(run\.loggers=)'(.*best\.py.*)'", page.read_text())
    monkeypatch.chdir(tmp_path)
    Path("best.py").write_text(code)
    with Tracker(Recipe.load("pocket-geneval", ["".join(words), "run.dir=run"])) as tracker:
        for iteration, score in ((0, 0.5), (2, 0.75), (4, 0.6)):
            tracker.evaluation(evaluation_row(iteration, 0.0, report(score)))
    assert Path("run/best.txt").read_text() == "0.75 after iteration 2\n"
    assert Path("run/tensorboard").is_dir()


def test_a_resumed_run_has_the_same_id_and_a_name_of_its_own(tmp_path, own):
    name, calls = own
    with Tracker(recipe(tmp_path, name)) as tracker:
        tracker.log(row(1))
        tracker.log(row(2))
    again = recipe(tmp_path, name, run={"name": "my run"})
    with pytest.raises(ValueError, match="some fault"), Tracker(again, resume_after=1):
        raise ValueError("some fault")
    (_, _, first, run_id, *_), (_, _, second, same_id, after, _) = (
        call for call in calls if call[0] == "begin"
    )
    assert (first, second) == ("run", "my run") and run_id == same_id and after == 1
    assert [call for call in calls if call[0] == "end"] == [("end", False), ("end", True)]
    calls.clear()
    with pytest.raises(KeyboardInterrupt), Tracker(again, resume_after=1):
        raise KeyboardInterrupt
    assert calls[-1] == ("end", False)
    (tmp_path / "run/loggers.json").write_text("[")
    with Tracker(again, resume_after=1) as tracker:
        (said,) = tracker.lost
    assert "loggers.json is damaged" in said and "delete it" in said


def test_a_large_batch_is_a_table_of_few_rows(tmp_path, own):
    name, calls = own
    with Tracker(recipe(tmp_path, name, samples={"every": 1})) as tracker:
        prompts = [str(number) for number in range(100)]
        tracker.table(1, {"prompt": prompts, "reward": torch.arange(100.0)})
    (rows,) = [call[3] for call in calls if call[0] == "table"]
    assert rows == [[str(number), float(number)] for number in range(0, 100, 7)]


def test_no_loggers_write_nothing(tmp_path):
    with Tracker(recipe(tmp_path, [])) as tracker:
        tracker.log(row(1))
    written = {file.name for file in (tmp_path / "run").iterdir()}
    assert written == {"recipe.yaml", "metrics.jsonl", "samples"}


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"csv": {"color": "red"}}, ["run.loggers: 'csv'", "color"]),
        ({"OWN:Mine": {"colour": "red"}}, ["run.loggers", "OWN:Mine", "colour"]),
        ("OWN:NoLogger", ["run.loggers", "derive a class from dgpo.run.loggers.Logger"]),
        ("OWN:Min", ["has no 'Min'", "did you mean 'Mine'"]),
    ],
)
def test_what_cannot_be_made_ends_a_run_before_its_folder_is_there(tmp_path, own, entry, words):
    file = own[0].partition(":")[0]
    entry = json.loads(json.dumps(entry).replace("OWN", file))
    with pytest.raises(UserError) as error:
        Tracker(recipe(tmp_path, [entry]))
    for word in words:
        assert word.replace("OWN", file) in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["wandb", "trackio", "swanlab"])
def test_a_package_that_is_not_installed_is_named_with_its_install_line(
    tmp_path, monkeypatch, name
):
    monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    with pytest.raises(MissingExtra, match=rf"needs {name}: pip install 'dgpo\[trackers\]'"):
        Tracker(recipe(tmp_path, name))


class Failing(Logger):
    """Raises what it is given, in the hook of that name."""

    def __init__(self, hook, error):
        self.calls = []
        for name in ("begin", "scalars", "image", "table", "end"):
            setattr(self, name, self.called(name, error if name == hook else None))

    def called(self, name, error):
        def hook(*given, **more):
            self.calls.append(name)
            if error is not None:
                raise error

        return hook


def with_loggers(monkeypatch, made):
    monkeypatch.setattr("dgpo.run.tracking.make_loggers", lambda entries: dict(made))


@pytest.mark.parametrize("error", [OSError("no network"), SystemExit(1), UserError("odd")])
@pytest.mark.parametrize("hook", ["scalars", "image", "table", "end"])
def test_one_that_fails_later_is_told_of_once_and_left_alone(tmp_path, monkeypatch, hook, error):
    one, two, said = Failing(hook, error), Failing("", None), []
    with_loggers(monkeypatch, {"one": one, "two": two})
    made = recipe(tmp_path, [], samples={"every": 1})
    with Tracker(made, say=said.append) as tracker:
        for iteration in (1, 2):
            tracker.log(row(iteration))
            tracker.table(iteration, {"prompt": CAPTIONS})
            tracker.grid("000001", REDS, CAPTIONS)
    every = ["begin", *["scalars", "table", "image"] * 2, "end"]
    assert two.calls == every and one.calls == every[: every.index(hook) + 1]
    (line,) = said
    iteration = 2 if hook == "end" else 1
    text = f"logger 'one' failed, and the run goes on without it: {told(error)}"
    assert "(test_loggers.py, line " in text
    assert line == f"warning, iteration {iteration}: {text}"
    assert read_jsonl(tmp_path / "run/warnings.jsonl") == [
        {"iteration": iteration, "warning": text}
    ]
    assert len(tracker.rows) == 2


@pytest.mark.parametrize("stop", [KeyboardInterrupt, Terminated])
@pytest.mark.parametrize("hook", ["begin", "scalars", "end"])
def test_a_stop_is_never_taken_for_a_failure(tmp_path, monkeypatch, hook, stop):
    with_loggers(monkeypatch, {"one": Failing(hook, stop())})
    with pytest.raises(stop), Tracker(recipe(tmp_path, [])) as tracker:
        tracker.log(row(1))


def test_one_that_cannot_begin_ends_a_new_run_which_may_begin_again(tmp_path, monkeypatch):
    first, second = Failing("", None), Failing("begin", RuntimeError("not logged in"))
    with_loggers(monkeypatch, {"one": first, "two": second})
    with pytest.raises(UserError, match="'two' could not begin: RuntimeError: not logged in"):
        Tracker(recipe(tmp_path, []))
    assert first.calls == ["begin", "end"] and second.calls == ["begin"]
    with_loggers(monkeypatch, {"one": first})
    with Tracker(recipe(tmp_path, [])) as tracker:
        tracker.log(row(1))
    with_loggers(monkeypatch, {"one": first, "two": second})
    with Tracker(recipe(tmp_path, []), resume_after=1) as tracker:
        (said,) = tracker.lost
        tracker.log(row(2))
    assert said.startswith(
        "logger 'two' failed, and the run goes on without it: RuntimeError: not logged in (test_log"
    )
    assert first.calls[-3:] == ["begin", "scalars", "end"] and second.calls[-1] == "begin"


def test_a_logger_takes_no_signal_from_the_run(tmp_path, monkeypatch):
    def take(*given, **more):
        signal.signal(signal.SIGINT, lambda *_: None)

    taking = Failing("", None)
    taking.begin = taking.end = take
    with_loggers(monkeypatch, {"one": taking})
    before = signal.getsignal(signal.SIGINT)
    with Tracker(recipe(tmp_path, [])):
        assert signal.getsignal(signal.SIGINT) is before
    assert signal.getsignal(signal.SIGINT) is before


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder / "run/tensorboard"))
    read.Reload()
    return read


def test_tensorboard_has_the_figures_alone_and_hides_what_is_done_again(tmp_path):
    made = recipe(tmp_path, "tensorboard", samples={"every": 1})
    with Tracker(made) as tracker:
        for iteration in (1, 2, 3):
            tracker.log(row(iteration, rewards={"a": iteration}))
            tracker.table(iteration, {"prompt": CAPTIONS})
            tracker.grid("000001", REDS, CAPTIONS)
    with Tracker(made, resume_after=1) as tracker:
        tracker.log(row(2, rewards={"a": 20}))
    read = events(tmp_path)
    tags = ["train/reward_mean", "train/loss", "train/seconds", "train/rewards/a"]
    assert sorted(read.Tags()["scalars"]) == sorted(tags)
    assert not read.Tags()["images"] and not read.Tags()["tensors"]
    assert [(e.step, e.value) for e in read.Scalars("train/rewards/a")] == [(1, 1.0), (2, 20.0)]
    assert not (tmp_path / "run/loggers.json").exists()


def test_tensorboard_has_pictures_and_tables_if_asked(tmp_path):
    made = recipe(tmp_path, {"tensorboard": {"images": True}}, samples={"every": 1})
    with Tracker(made) as tracker:
        tracker.log(row(1))
        tracker.table(1, {"prompt": CAPTIONS, "redness": [0.5, 1]})
        tracker.grid("000001", REDS, CAPTIONS)
    read = events(tmp_path)
    assert read.Tags()["images"] == ["samples/grid"]
    (name,) = read.Tags()["tensors"]
    (text,) = read.Tensors(name)[0].tensor_proto.string_val
    assert b"| prompt | redness |\n| --- | --- |\n| a cat | 0.5 |" in text


def test_jsonl_has_flat_figures_and_drops_what_is_done_again(tmp_path):
    with Tracker(recipe(tmp_path, "jsonl")) as tracker:
        tracker.evaluation(evaluation_row(0, 0.0, report(0.5)))
        for iteration in (1, 2, 3):
            tracker.log(row(iteration, rewards={"a": 1.5}))
    with Tracker(recipe(tmp_path, "jsonl"), resume_after=1) as tracker:
        tracker.log(row(2))
    rows = read_jsonl(tmp_path / "run/scalars.jsonl")
    figures = {"train/reward_mean": 0.5, "train/loss": 0.25, "train/seconds": 2.0}
    assert rows == [
        {"iteration": 0, "eval/overall": 0.5, "eval/rewards/redness": 0.5, "eval/n": 4},
        {"iteration": 1, **figures, "train/rewards/a": 1.5},
        {"iteration": 2, **figures},
    ]


def table(file):
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_csv_has_a_column_for_every_figure_whenever_it_comes(tmp_path):
    with Tracker(recipe(tmp_path, "csv")) as tracker:
        tracker.evaluation(evaluation_row(0, 0.0, report(0.5)))
        tracker.log(row(1, loss=0.1))
        tracker.log(row(2, clipped=0.5))
        tracker.log({**row(3), "loss": None})
        tracker.log(row(4))
    train = tmp_path / "run/train.csv"
    assert [tuple(one.values()) for one in table(train)] == [
        ("1", "0.5", "0.1", "2.0", ""),
        ("2", "0.5", "0.25", "2.0", "0.5"),
        ("3", "0.5", "", "2.0", ""),
        ("4", "0.5", "0.25", "2.0", ""),
    ]
    assert train.read_text().startswith("iteration,reward_mean,loss,seconds,clipped\n")
    (score,) = table(tmp_path / "run/eval.csv")
    assert score == {"iteration": "0", "overall": "0.5", "rewards/redness": "0.5", "n": "4"}
    with train.open("a") as stream:
        stream.write("5,0.")  # a kill has cut the line
    with Tracker(recipe(tmp_path, "csv"), resume_after=2) as tracker:
        tracker.log(row(3))
    assert [one["iteration"] for one in table(train)] == ["1", "2", "3"]
    assert len(table(tmp_path / "run/eval.csv")) == 1


def fake(monkeypatch, name, signature):
    """A module with a tracker's names, which keeps the calls."""
    calls = []

    def noted(word, answer=None):
        def call(*given, **more):
            calls.append((word, *given, *([more] if more else [])))
            return answer

        return call

    run = SimpleNamespace(
        log=noted("log"), finish=noted("finish"), define_metric=noted("define_metric")
    )
    package: ModuleType | SimpleNamespace = SimpleNamespace(
        init=noted("init", run),
        finish=noted("finish"),
        Image=lambda image: ("image", image.size[0] > 8),
        Table=lambda columns, data: ("table", columns, data),
        echarts=SimpleNamespace(
            Table=lambda: SimpleNamespace(add=lambda columns, rows: ("table", columns, rows))
        ),
    )
    package.init.__signature__ = inspect.Signature(
        inspect.Parameter(word, inspect.Parameter.KEYWORD_ONLY) for word in signature
    )
    monkeypatch.setitem(sys.modules, name, package)
    for variable in ("WANDB_PROJECT", "SWANLAB_PROJ_NAME"):
        monkeypatch.delenv(variable, raising=False)
    return calls


INIT = {
    "wandb": ["project", "name", "dir", "id", "resume", "config", "tags"],
    "trackio": ["project", "name", "resume", "config", "space_id"],
    "swanlab": ["project", "name", "log_dir", "id", "resume", "config", "mode"],
}


def logged(name, values, step):
    if name == "wandb":
        return ("log", {"iteration": step, **values})
    return ("log", values, {"step": step})


@pytest.mark.parametrize("name", INIT)
def test_the_calls_that_a_tracker_gets(tmp_path, monkeypatch, name):
    calls = fake(monkeypatch, name, INIT[name])
    option = {"wandb": {"tags": ["a"]}, "trackio": {"space_id": "me/x"}, "swanlab": {}}[name]
    made = recipe(tmp_path, {name: {"project": "mine", **option}}, samples={"every": 1})
    for after in (None, 1):
        with Tracker(made, after) as tracker:
            tracker.log(row(2 if after else 1))
            tracker.table(tracker.rows[-1]["iteration"], {"prompt": ["a cat"], "redness": [0.5]})
            tracker.grid("000001", REDS, CAPTIONS)
    run_id = json.loads((tmp_path / "run/loggers.json").read_text())["id"]
    config, folder = made.to_dict(), str(tmp_path / "run")
    own = {
        "wandb": lambda new: {"name": "run", "dir": folder, "id": run_id, "resume": new or "allow"},
        "trackio": lambda new: {"name": f"run-{run_id}", "resume": new or "allow"},
        "swanlab": lambda new: {
            "name": "run",
            "log_dir": f"{folder}/swanlog",
            "id": run_id,
            "resume": "allow",
        },
    }[name]
    expected = []
    for step, new in ((1, "never"), (2, None)):
        given = {"project": "mine", **own(new), **option, "config": config}
        if name == "wandb" and new:
            given["resume"] = None
        expected.append(("init", given))
        if name == "wandb":
            expected.append(("define_metric", "iteration"))
            expected.append(("define_metric", "*", {"step_metric": "iteration"}))
        figures = {"train/reward_mean": 0.5, "train/loss": 0.25, "train/seconds": 2.0}
        expected += [
            logged(name, figures, step),
            logged(name, {"rollouts": ("table", ["prompt", "redness"], [["a cat", 0.5]])}, step),
            logged(name, {"samples/grid": ("image", True)}, step),
        ]
        end: dict[str, dict] = {
            "wandb": {"exit_code": 0},
            "trackio": {},
            "swanlab": {"state": "success", "error": None},
        }
        expected.append(("finish", *([end[name]] if end[name] else [])))
    assert calls == expected


@pytest.mark.parametrize("name", INIT)
@pytest.mark.parametrize(
    ("key", "words"),
    [("projct", "unknown (did you mean 'project'?)"), ("config", "the run gives it")],
)
def test_options_are_arguments_of_init(tmp_path, monkeypatch, name, key, words):
    fake(monkeypatch, name, INIT[name])
    with pytest.raises(UserError) as error:
        Tracker(recipe(tmp_path, {name: {key: "x"}}))
    assert f"run.loggers.{name}.{key}: {words}; options are arguments of {name}.init: " in str(
        error.value
    )


def test_a_run_that_an_error_ends_is_a_failed_one(tmp_path, monkeypatch):
    ends = {
        "wandb": {"exit_code": 1},
        "swanlab": {"state": "crashed", "error": "an error ended the run"},
    }
    for name, end in ends.items():
        calls = fake(monkeypatch, name, INIT[name])
        with pytest.raises(ValueError), Tracker(recipe(tmp_path / name, name)):
            raise ValueError
        assert calls[-1] == ("finish", end)


def test_the_project_may_come_from_the_environment(tmp_path, monkeypatch):
    for name, variable in (("wandb", "WANDB_PROJECT"), ("swanlab", "SWANLAB_PROJ_NAME")):
        calls = fake(monkeypatch, name, INIT[name])
        with Tracker(recipe(tmp_path / f"{name}1", name)):
            assert calls[0][1]["project"] == "dgpo"
        monkeypatch.setenv(variable, "theirs")
        with Tracker(recipe(tmp_path / f"{name}2", name)):
            assert [call[1]["project"] for call in calls if call[0] == "init"][-1] == "theirs"


def test_other_processes_write_nothing(tmp_path):
    recipe = Recipe.from_dict({"run": {"dir": str(tmp_path / "run")}})
    with Outputs(recipe, None, main=False) as outputs:
        outputs.say("nothing")
        outputs.stage("rollout")
        outputs.warn(1, ["nothing"])
    assert outputs.tracker is None and outputs.progress is None and outputs.lost == []
    assert list(tmp_path.iterdir()) == []
