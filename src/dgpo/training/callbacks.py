"""Callbacks: what a user, and the trainer itself, do between the steps of a run.

Everything that the trainer does beside collecting and updating is a callback too
(:mod:`dgpo.training.routine`), so that a user's callback can do whatever the trainer can.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from dgpo.distributed.processes import Processes
from dgpo.errors import UserError, told
from dgpo.evaluation import Report
from dgpo.models.counting import COUNTED
from dgpo.recipe import Recipe
from dgpo.registry import resolve

Phase = Literal["new", "tried", "again", "between", "updating", "ended"]
"""Where a run stands: its folder is not made (``new``), a first attempt to make it may have failed
(``tried``), it was stopped before its first checkpoint and begins again (``again``), it is between
two iterations, within an update, or has ended."""


@dataclass
class TrainerState:
    """All that a run knows of itself, beside weights and optimiser; checkpoints save it as one.

    A callback is given a read-only view of it.

    Args:
        recipe: every setting of the run.
        is_main_process: whether this process writes the run folder and speaks for all.
        iteration: iterations done.
        seconds: training time spent: rollouts, rewards and updates; evaluation does not count.
        counted: totals of pictures, forward and backward passes (docs/comparing.md).
        not_saved: iterations whose weights were not saved, so that their scores are no bar for
            others.
        phase: where the run stands.
        delivered: the iteration whose weights are the run's result; None for the last.
        log_history: every row of ``metrics.jsonl`` and ``evaluations.jsonl`` so far, in order.
        news: what has to be said when training begins.
        last_report: the last evaluation since this object was made; None if there was none.
    """

    recipe: Recipe
    is_main_process: bool = True
    iteration: int = 0
    seconds: float = 0.0
    counted: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTED, 0))
    not_saved: set[int] = field(default_factory=set)
    phase: Phase = "new"
    delivered: int | None = None
    log_history: list[dict[str, Any]] = field(default_factory=list)
    news: list[str] = field(default_factory=list)
    last_report: Report | None = None

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.recipe.run.dir)

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The rows of ``log_history`` that are evaluations: ``overall``, ``rewards``, ``ci95``."""
        return [row for row in self.log_history if "overall" in row]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of ``log_history`` that are iterations."""
        return [row for row in self.log_history if "overall" not in row]

    @property
    def score(self) -> float | None:
        """The held-out score after the present iteration, if there is one."""
        return self._scores().get(self.iteration)

    @property
    def is_best(self) -> bool:
        """True if the present score beats all before it whose weights may have been saved."""
        scores = {done: one for done, one in self._scores().items() if done not in self.not_saved}
        mine = scores.pop(self.iteration, None)
        return mine is not None and mine > max(scores.values(), default=float("-inf"))

    def _scores(self) -> dict[int, float]:
        rows = self.evaluations
        return {r["iteration"]: r["overall"] for r in rows if r["overall"] is not None}

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps; the history is in files of its own."""
        counters = {"iteration": self.iteration, "seconds": self.seconds, **self.counted}
        return {**counters, "not_saved": sorted(self.not_saved)}

    def read_json(self, saved: Mapping[str, Any]) -> None:
        """Take over what :meth:`to_json` gave, of this version or an earlier one."""
        self.iteration, self.seconds = saved["iteration"], saved["seconds"]
        self.counted = {name: saved.get(name, 0) for name in COUNTED}
        self.not_saved = set(saved.get("not_saved", ()))


@dataclass
class Control:
    """What callbacks ask the trainer for. A request of one process holds for all.

    Args:
        should_evaluate: score the held-out prompts after this iteration.
        should_save: write a checkpoint after this iteration.
        should_stop: end the run after this iteration, as if it were the last.
        deliver: which weights the run ends with: the last, or those of the best held-out score.
        reason: why it ends early, to be said to the user.
    """

    should_evaluate: bool = False
    should_save: bool = False
    should_stop: bool = False
    deliver: Literal["last", "best"] = "last"
    reason: str | None = None


class Callback:
    """A base class: override the hooks that you need, and give it to ``Trainer(callbacks=[...])``
    or name it in ``run.callbacks``.

    Every process calls every hook, in the same order; ``state.is_main_process`` tells the one that
    should write or print. A hook reads ``state`` and asks by ``control``. A hook that raises ends
    the run, in all processes, with the callback's name.

    >>> class StopEarly(Callback):
    ...     def on_iteration_end(self, state, control, row, **what):
    ...         if row["reward_mean"] > 0.9:
    ...             control.should_stop = True
    """

    def on_train_begin(self, state: TrainerState, control: Control, **what: Any) -> None:
        """Training begins or goes on; the run folder is there."""

    def on_iteration_begin(self, state: TrainerState, control: Control, **what: Any) -> None:
        """The rollouts of iteration ``state.iteration + 1`` come next."""

    def on_rollout(
        self,
        state: TrainerState,
        control: Control,
        *,
        images: Sequence[Any],
        prompts: Sequence[str],
        rewards: Mapping[str, Tensor],
        advantages: Tensor,
        **what: Any,
    ) -> None:
        """An iteration's pictures are scored, and not yet learned from. Not called for groups that
        were ranked before the run.

        Args:
            images: this process's B pictures, videos or sounds.
            prompts: the text of each.
            rewards: by name, float32 [B]; NaN where a reward was not asked.
            advantages: [B]; 0 in a group without spread, NaN in one that a reward has failed.
        """

    def on_log(
        self, state: TrainerState, control: Control, *, row: Mapping[str, Any], **what: Any
    ) -> None:
        """An iteration is written down: ``row`` is its line of ``metrics.jsonl``. A signal waits
        until this is done, so it should not take long."""

    def on_iteration_end(
        self, state: TrainerState, control: Control, *, row: Mapping[str, Any], **what: Any
    ) -> None:
        """An iteration is done: ``row`` is its line of ``metrics.jsonl``. What is asked for here
        is done at once."""

    def on_evaluate(
        self, state: TrainerState, control: Control, *, report: Report, **what: Any
    ) -> None:
        """The held-out prompts are scored."""

    def on_save(self, state: TrainerState, control: Control, **what: Any) -> None:
        """A checkpoint and the model are written."""

    def on_train_end(self, state: TrainerState, control: Control, **what: Any) -> None:
        """The run has reached its end. Not called when it was interrupted."""

    def on_interrupt(self, state: TrainerState, control: Control, **what: Any) -> None:
        """Ctrl-C or SIGTERM stops the run, which can go on later."""


class Callbacks:
    """The callbacks of a run, called in order.

    Args:
        callbacks: the trainer's own and the user's.
        state: the state of the run.
        processes: agree on what is asked for.
    """

    def __init__(
        self, callbacks: Sequence[Callback], state: TrainerState, processes: Processes
    ) -> None:
        self._callbacks, self._state, self._processes = list(callbacks), state, processes
        self._view: Any = _ReadOnly(state)
        self.control = Control()

    def add(self, *callbacks: Callback) -> None:
        """Append callbacks."""
        self._callbacks += callbacks

    def __iter__(self) -> Iterator[Callback]:
        return iter(self._callbacks)

    def __call__(self, hook: str, **what: Any) -> None:
        """Call a hook of all callbacks.

        Raises:
            UserError: a user's callback raised; it is named.
        """
        for callback in self._callbacks:
            method = getattr(callback, hook)
            if isinstance(callback, OwnCallback):
                method(self._state, self.control, **what)
                continue
            try:
                method(self._view, self.control, **what)
            except Exception as error:
                name = f"callback {type(callback).__name__}.{hook}"
                if isinstance(error, UserError):
                    raise UserError(f"{name}: {error}") from error
                raise UserError(f"{name} raised {told(error)}") from error

    def agree(self) -> None:
        """Make what one process is asked for what all are asked for. Collective.

        Guards, clocks and users may see other figures in another process. A process that stopped,
        evaluated or saved alone would leave the others waiting for it.
        """
        if self._processes.single:
            return
        said = self._processes.all_gather_object(asdict(self.control), "what callbacks ask for")
        for name in ("should_evaluate", "should_save", "should_stop"):
            setattr(self.control, name, any(one[name] for one in said))
        self.control.reason = next((one["reason"] for one in said if one["reason"]), None)
        if any(one["deliver"] == "best" for one in said):
            self.control.deliver = "best"


class OwnCallback(Callback):
    """A callback of the trainer itself, which may write the state."""


class _ReadOnly:
    """A view of the state for callbacks."""

    def __init__(self, state: TrainerState) -> None:
        object.__setattr__(self, "_state", state)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_state"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(
            f"state.{name} is read-only; ask the trainer by control, e.g. control.should_stop = "
            "True"
        )


def load_callbacks(names: Sequence[str]) -> list[Callback]:
    """The callbacks that ``run.callbacks`` names, made without arguments.

    Args:
        names: ``package.module:Class`` or ``path/to/file.py:Class``, or an object made already.

    Raises:
        UserError: one cannot be imported or made, or is no :class:`Callback`.
    """
    return [_callback(resolve("callback", name), f"run.callbacks: {name!r}") for name in names]


def checked_callbacks(given: Any) -> list[Callback]:
    """The callbacks that a trainer was given: objects, or classes that need no arguments.

    Raises:
        UserError: one is no :class:`Callback`.
    """
    several = isinstance(given, (list, tuple))
    return [_callback(one, "callbacks") for one in (given if several else [given])]


def _callback(found: Any, where: str) -> Callback:
    if isinstance(found, type):
        try:
            found = found()
        except TypeError as error:
            raise UserError(
                f"{where}: {error}; a class that takes arguments is given as an object, by "
                "Trainer(callbacks=[...])"
            ) from error
    if not isinstance(found, Callback):
        raise UserError(f"{where}: {found!r:.80} is no dgpo.Callback; derive its class from it")
    return found
