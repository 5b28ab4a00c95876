"""The run folder: what a run was asked to do, what it measured, and pictures of both."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from dgpo.disk import replace_text
from dgpo.errors import UserError
from dgpo.media import Sound, Video, save_media
from dgpo.recipe import Recipe
from dgpo.run.card import model_card
from dgpo.run.pictures import before_after, curve, grid

FILES = ("metrics.jsonl", "evaluations.jsonl")
"""The files of a run's iterations and of its evaluations."""
REQUIRED = ("iteration", "reward_mean", "loss", "seconds")
"""What every line of ``metrics.jsonl`` has; ``seconds`` is training time since the start."""


def refuse_existing_run(folder: str | Path) -> None:
    """Refuse a folder that holds a run already; to be called before a model is loaded.

    Raises:
        UserError: it does; the message says how to go on with it and how to choose another.
    """
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise UserError(f"run.dir = {str(folder)!r} is a file; choose a folder: run.dir=FOLDER")
    metrics = path / "metrics.jsonl"
    if (path / "recipe.yaml").exists() or metrics.exists():
        done = metrics.read_bytes().count(b"\n") if metrics.is_file() else 0
        raise UserError(
            f"run.dir = {str(folder)!r} already holds a run ({done} iterations). To go on with it: "
            f"dgpo train {path / 'recipe.yaml'} --resume. To keep it and start another: "
            "add run.dir=ANOTHER_FOLDER"
        )


def read_jsonl(file: str | Path) -> list[dict[str, Any]]:
    """The objects of a ``.jsonl`` file; none when it is missing. A last line that was cut short
    by a crash is left out.

    Raises:
        UserError: another line is no JSON object; it is named.
    """
    return _read(Path(file))[0]


def _read(file: Path) -> tuple[list[dict[str, Any]], bytes]:
    """The objects of a file, and the last line if it was cut short: it has no newline then."""
    # only at newlines: str.splitlines would also cut at U+2028 inside a text
    lines = file.read_bytes().split(b"\n") if file.exists() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                return rows, line
            raise _broken(file, number, f"not JSON ({error})") from error
        if not isinstance(row, dict):
            raise _broken(file, number, f"{row!r:.40} is no object")
        rows.append(row)
    return rows, b""


def _broken(file: Path, number: int, why: str) -> UserError:
    return UserError(
        f"{file}, line {number}: {why}; put this line right or delete it (it holds what was "
        "measured, on which no weight depends), and try again"
    )


class Tracker:
    """Writes a run folder::

        recipe.yaml         every setting, defaults included
        run.json            versions, seed, commit, machine and command of every start
        metrics.jsonl       one object for every iteration
        evaluations.jsonl   one object for every evaluation
        warnings.jsonl      what the guards have seen, if they have
        tensorboard/        the same as events
        samples/            grids of fixed prompts and seeds; before_after.png at the end
        curve.png           rewards and evaluations over the run
        README.md           a model card with the measured numbers

    Args:
        recipe: of the run; ``run.dir`` is the folder.
        resume_after: go on with the run in the folder after this iteration: later lines, which a
            run that was cut off may have left, are dropped; -1 for all. None starts a run.

    Raises:
        UserError: the folder holds a run and none was to be resumed, or the other way round, or a
            file of the run is damaged.
    """

    def __init__(self, recipe: Recipe, resume_after: int | None = None) -> None:
        self.recipe = recipe
        self.folder = Path(recipe.run.dir)
        self._metrics = self.folder / "metrics.jsonl"
        self._evaluations = self.folder / "evaluations.jsonl"
        self._warnings = self.folder / "warnings.jsonl"
        if resume_after is None:
            refuse_existing_run(self.folder)
        elif not (self.folder / "recipe.yaml").exists():
            raise UserError(f"run.dir = {str(self.folder)!r} holds no run to resume")
        (self.folder / "samples").mkdir(parents=True, exist_ok=True)
        replace_text(self.folder / "recipe.yaml", recipe.to_yaml())
        self.lost: list[str] = []
        """What a resumed run has no longer of what was measured before it."""
        if resume_after is not None:
            files = {
                self._metrics: REQUIRED,
                self._evaluations: ("iteration", "overall", "rewards"),
            }
            for file, needed in {**files, self._warnings: ("iteration", "warning")}.items():
                self.lost += _keep(file, needed, resume_after)
            self.lost += _gaps(self._metrics, resume_after)
        self._events = _event_writer(self.folder / "tensorboard", resume_after)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

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
        _append(self._metrics, values)
        self._scalars("train", values, values["iteration"])

    def evaluation(self, iteration: int, seconds: float, report: Any) -> None:
        """Write an evaluation's :class:`dgpo.evaluation.Report` (or a mapping like it).

        Args:
            iteration: after which it was made; 0 is the base model.
            seconds: training time spent by then.
            report: the evaluation's outcome.
        """
        row = evaluation_row(iteration, seconds, report)
        _append(self._evaluations, row)
        self._scalars("eval", {k: v for k, v in row.items() if k != "seconds"}, iteration)

    def warning(self, iteration: int, text: str) -> None:
        """Write what a guard has seen after an iteration; once, however often what was stopped
        there is done again."""
        row = {"iteration": iteration, "warning": text}
        if row not in read_jsonl(self._warnings):
            _append(self._warnings, row)

    def grid(self, name: str, images: Sequence[Any], captions: Sequence[str]) -> Path:
        """Write ``samples/NAME.png``: ``before``, ``after`` or an iteration's number; videos and
        sounds lie beside it as files of their own, in ``samples/NAME/``."""
        file = self.folder / "samples" / f"{name}.png"
        grid(images, captions).save(file)
        if isinstance(images[0], (Video, Sound)):
            how = self.recipe.samples
            save_media(images, file.with_suffix(""), how.video, how.fps)
        return file

    def compare(self, before: Sequence[Any], after: Sequence[Any], captions: Sequence[str]) -> Path:
        """Write ``samples/before_after.png``: the same prompts and seeds, side by side."""
        file = self.folder / "samples" / "before_after.png"
        before_after(before, after, captions).save(file)
        return file

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

    def close(self) -> None:
        self._events.close()

    def _scalars(self, prefix: str, row: Mapping[str, Any], step: int) -> None:
        for key, value in row.items():
            if isinstance(value, Mapping):
                self._scalars(f"{prefix}/{key}", value, step)
            elif isinstance(value, (int, float)) and key != "iteration":
                self._events.add_scalar(f"{prefix}/{key}", value, step)


def evaluation_row(iteration: int, seconds: float, report: Any) -> dict[str, Any]:
    """A line of ``evaluations.jsonl``; arguments as of :meth:`Tracker.evaluation`."""
    body: dict[str, Any] = dict(report) if isinstance(report, Mapping) else asdict(report)
    return plain({"iteration": iteration, "seconds": seconds, **body})


def read_history(folder: str | Path, last: int) -> list[dict[str, Any]]:
    """The iterations and evaluations of a run up to iteration ``last``, in the order in which they
    were made.

    Raises:
        UserError: as :func:`read_jsonl`.
    """
    rows = [row for name in FILES for row in read_jsonl(Path(folder) / name)]
    known = [row for row in rows if type(row.get("iteration")) is int]
    return sorted((r for r in known if r["iteration"] <= last), key=lambda r: r["iteration"])


def _event_writer(folder: Path, resume_after: int | None) -> Any:
    # tensorboard takes a second to import: only a run that trains pays for it
    from torch.utils.tensorboard import SummaryWriter

    purge = None if resume_after is None else resume_after + 1
    return SummaryWriter(str(folder), purge_step=purge)


def plain(value: Any) -> Any:
    """Numbers, texts, lists and dicts that JSON can hold."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _append(file: Path, row: dict[str, Any]) -> None:
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row, ensure_ascii=False) + "\n")
        stream.flush()
        os.fsync(stream.fileno())  # a checkpoint must not outlive the rows before it


def _keep(file: Path, needed: Sequence[str], last: int) -> list[str]:
    """Leave out the rows after iteration ``last``, and a line that was cut short; what is lost of
    those before, in words."""
    if not file.exists():
        return []
    rows, cut = _read(file)
    for number, row in enumerate(rows, start=1):
        missing = [key for key in needed if key not in row]
        if missing or type(row["iteration"]) is not int:
            what = f"without {', '.join(missing)}" if missing else f"{row['iteration']!r:.40}"
            raise UserError(
                f"{file}: row {number} is no row of a run (iteration: {what}); put it right or "
                "delete it, and try again"
            )
    kept = [row for row in rows if row["iteration"] <= last]
    replace_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
    shown = cut[:60].decode("utf-8", "replace")
    return [f"{file}: the last line was cut short and is left out: {shown}..."] if cut else []


def _gaps(file: Path, last: int) -> list[str]:
    """The iterations up to ``last`` whose row is missing, in words."""
    there = {row["iteration"] for row in read_jsonl(file)}
    missing = [iteration for iteration in range(1, last + 1) if iteration not in there]
    if not missing:
        return []
    shown = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
    return [f"{file} has no row of {len(missing)} earlier iterations: {shown}"]
