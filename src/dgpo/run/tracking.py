"""The run folder: what a run was asked to do, what it measured, and pictures of both."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from dgpo.disk import replace_text, resume_command
from dgpo.errors import UserError
from dgpo.media import Sound, Video, save_media
from dgpo.recipe import Recipe
from dgpo.run.card import model_card
from dgpo.run.jsonl import append_row, keep_rows, missing_rows, read_jsonl
from dgpo.run.loggers.base import LoggedRun
from dgpo.run.loggers.composite import Loggers, make_loggers
from dgpo.run.pictures import before_after, curve, grid

FILES = ("metrics.jsonl", "evaluations.jsonl")
"""The files of a run's iterations and of its evaluations."""
REQUIRED = ("iteration", "reward_mean", "loss", "seconds")
"""What every line of ``metrics.jsonl`` has; ``seconds`` is training time since the start."""
TABLE_ROWS = 16
"""The most rows of a table of prompts and rewards; a large batch is thinned out."""


def refuse_existing_run(folder: str | Path) -> None:
    """Refuse a folder that holds a run already; call it before a model is loaded.

    Raises:
        UserError: it does; the message says how to go on with it and how to choose another.
    """
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise UserError(f"run.dir = {str(folder)!r} is a file; choose a folder: run.dir=FOLDER")
    metrics = path / FILES[0]
    if (path / "recipe.yaml").exists() or metrics.exists():
        done = metrics.read_bytes().count(b"\n") if metrics.is_file() else 0
        raise UserError(
            f"run.dir = {str(folder)!r} already holds a run ({done} iterations). To go on with it: "
            f"{resume_command(path)}. To keep it and start another: add run.dir=ANOTHER_FOLDER"
        )


class Tracker:
    """Writes a run folder, and hands the same figures to the loggers of ``run.loggers``.

    The folder holds::

        recipe.yaml         every setting, defaults included; recipe-1.yaml, recipe-2.yaml, ... are
                            those before the run went on with others
        run.json            versions, seed, commit, machine and command of every start
        metrics.jsonl       one object for every iteration
        evaluations.jsonl   one object for every evaluation
        warnings.jsonl      what the guards have seen, and loggers that failed
        samples/            grids of fixed prompts and seeds; before_after.png at the end
        curve.png           rewards and evaluations over the run
        README.md           a model card with the measured numbers

    The files of loggers lie beside them (docs/logging.md).

    Args:
        recipe: the run's settings; ``run.dir`` is the folder.
        resume_after: go on with the run in the folder after this iteration: later lines, which a
            run that was cut off may have left, are dropped; -1 drops all. None starts a run.
        say: shows a line to the user.

    Raises:
        UserError: the folder holds a run and none was to be resumed, or the other way round; a
            file of the run is damaged; or a logger of a new run cannot begin.
        MissingExtra: the package of a logger is not installed.
    """

    def __init__(
        self,
        recipe: Recipe,
        resume_after: int | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.recipe, self.folder = recipe, Path(recipe.run.dir)
        self._metrics, self._evaluations = (self.folder / name for name in FILES)
        self._warnings = self.folder / "warnings.jsonl"
        if resume_after is None:
            refuse_existing_run(self.folder)
        elif not (self.folder / "recipe.yaml").exists():
            raise UserError(f"run.dir = {str(self.folder)!r} holds no run to resume")
        self._iteration = max(resume_after or 0, 0)
        self.lost: list[str] = []
        """What a resumed run has lost: rows that were measured before it, and loggers."""
        loggers = make_loggers(recipe.run.loggers)
        (self.folder / "samples").mkdir(parents=True, exist_ok=True)
        if resume_after is not None:
            self.lost += self._resumed(resume_after)
        self.loggers = Loggers(loggers, self.lost.append)
        name = recipe.run.name or self.folder.resolve().name
        self.loggers.begin(LoggedRun(name, self.folder, recipe.to_dict(), resume_after))
        self.loggers.tell = self._logger_failed
        self._say = say
        # last: a folder without it holds no run, so that a new run whose logger failed can begin
        self._write_recipe()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.loggers.end(failed=isinstance(error, Exception))

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All iterations so far."""
        return read_jsonl(self._metrics)

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """All evaluations so far."""
        return read_jsonl(self._evaluations)

    def log(self, row: Mapping[str, Any]) -> None:
        """Write the metrics of an iteration.

        Args:
            row: at least ``iteration``, ``reward_mean``, ``loss``, ``seconds``; numbers, 0-dim
                tensors, texts or nested dicts. What is not finite becomes null.
        """
        missing = [key for key in REQUIRED if key not in row]
        assert not missing, f"metrics row without {missing}"
        values = plain(row)
        append_row(self._metrics, values)
        self._iteration = values["iteration"]
        self.loggers.scalars(dict(_scalars("train", values)), self._iteration)

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """Write an evaluation: what :func:`evaluation_row` returns."""
        append_row(self._evaluations, dict(row))
        scores = {key: value for key, value in row.items() if key != "seconds"}
        self.loggers.scalars(dict(_scalars("eval", scores)), row["iteration"])

    def warning(self, iteration: int, text: str) -> None:
        """Write what the user should know after an iteration; only once, because a run that goes on
        after a stop may find the same again."""
        row = {"iteration": iteration, "warning": text}
        if row not in read_jsonl(self._warnings):
            append_row(self._warnings, row)

    def table(self, iteration: int, columns: Mapping[str, Any]) -> None:
        """Hand some rows of an iteration's rollouts to the loggers, as often as grids are drawn.

        Nothing is written into the run folder itself.

        Args:
            iteration: the iteration that the rollouts belong to, counted from 1.
            columns: ``prompt`` and the rewards by name, with B values each: texts, numbers or a
                tensor [B].
        """
        if not self.recipe.grid_due(iteration):
            return
        count = len(next(iter(columns.values())))
        chosen = range(0, count, math.ceil(count / TABLE_ROWS))
        rows = [[plain(column[place]) for column in columns.values()] for place in chosen]
        self.loggers.table("rollouts", list(columns), rows, iteration)

    def grid(self, name: str, images: Sequence[Any], captions: Sequence[str]) -> None:
        """Write ``samples/NAME.png``: ``before``, ``after`` or an iteration's number.

        Videos and sounds lie beside it as files of their own, in ``samples/NAME/``.
        """
        file = self._save_sheet(name, grid(images, captions), "samples/grid")
        if any(isinstance(image, (Video, Sound)) for image in images):
            how = self.recipe.samples
            save_media(images, file.with_suffix(""), how.video, how.fps)

    def compare(self, before: Sequence[Any], after: Sequence[Any], captions: Sequence[str]) -> None:
        """Write ``samples/before_after.png``: the same prompts and seeds, side by side."""
        self._save_sheet(
            "before_after", before_after(before, after, captions), "samples/before_after"
        )

    def summarize(self, delivered: int | None = None) -> None:
        """Draw ``curve.png`` and write ``README.md`` from what was measured; may be repeated.

        Args:
            delivered: the iteration whose weights are the run's result; None for the last.
        """
        rows, evaluations = self.rows, self.evaluations
        if rows or evaluations:
            curve(rows, evaluations, self.folder / "curve.png")
        if delivered is not None:
            evaluations = [row for row in evaluations if row["iteration"] <= delivered]
            rows = [row for row in rows if row["iteration"] <= delivered]
        card = model_card(self.recipe, rows, evaluations, self.folder)
        (self.folder / "README.md").write_text(card, encoding="utf-8")

    def _resumed(self, last: int) -> list[str]:
        """Drop what was measured after an iteration; returns what is missing before it."""
        files = {
            self._metrics: REQUIRED,
            self._evaluations: ("iteration", "overall", "rewards"),
            self._warnings: ("iteration", "warning"),
        }
        lost = [text for file, needed in files.items() for text in keep_rows(file, needed, last)]
        return lost + missing_rows(self._metrics, last)

    def _write_recipe(self) -> None:
        """Write ``recipe.yaml``; an earlier one that differs is kept under the next free number."""
        file, text = self.folder / "recipe.yaml", self.recipe.to_yaml()
        earlier = file.read_text(encoding="utf-8", errors="replace") if file.exists() else text
        if earlier != text:
            names = (self.folder / f"recipe-{number}.yaml" for number in itertools.count(1))
            replace_text(next(name for name in names if not name.exists()), earlier)
        replace_text(file, text)

    def _save_sheet(self, name: str, sheet: Image.Image, logged_as: str) -> Path:
        file = self.folder / "samples" / f"{name}.png"
        sheet.save(file)
        self.loggers.image(logged_as, sheet, self._iteration)
        return file

    def _logger_failed(self, text: str) -> None:
        self.warning(self._iteration, text)
        self._say(f"warning, iteration {self._iteration}: {text}")


def evaluation_row(iteration: int, seconds: float, report: Any) -> dict[str, Any]:
    """Build a line of ``evaluations.jsonl``.

    Args:
        iteration: iterations done when the evaluation was made; 0 is the base model.
        seconds: training time spent by then.
        report: a :class:`dgpo.evaluation.Report`, or a mapping like it.
    """
    body: dict[str, Any] = dict(report) if isinstance(report, Mapping) else asdict(report)
    return plain({"iteration": iteration, "seconds": seconds, **body})


def read_history(folder: str | Path, last: int) -> list[dict[str, Any]]:
    """Read the iterations and evaluations of a run up to iteration ``last``, in the order in which
    they were made.

    Raises:
        UserError: see :func:`read_jsonl`.
    """
    rows = [row for name in FILES for row in read_jsonl(Path(folder) / name)]
    known = [row for row in rows if type(row.get("iteration")) is int]
    return sorted((r for r in known if r["iteration"] <= last), key=lambda r: r["iteration"])


def plain(value: Any) -> Any:
    """Turn numbers, 0-dim tensors, texts, lists and dicts into what JSON can hold."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _scalars(prefix: str, row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the numbers of a nested row by tag, such as ``train/rewards/redness``."""
    for key, value in row.items():
        if isinstance(value, Mapping):
            yield from _scalars(f"{prefix}/{key}", value)
        elif isinstance(value, (int, float)) and key != "iteration":
            yield f"{prefix}/{key}", value
