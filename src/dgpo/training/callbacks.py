"""Callbacks: what a user, and the trainer itself, do between the steps of a run.

Everything that the trainer does beside collecting and updating is a callback too
(:mod:`dgpo.training.routine`), so that a user's callback can do whatever the trainer can.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import Tensor

from dgpo.distributed.processes import Processes
from dgpo.errors import UserError, message, told
from dgpo.evaluation import Report
from dgpo.registry import resolve
from dgpo.training.state import TrainerState
from dgpo.user_classes import make, refuse_misspelt, refuse_signatures
from dgpo.user_code import own, user_code


@dataclass(slots=True)  # a request under a misspelt name raises
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
            images: this process's B pictures, videos or sounds, as the pipeline gave them.
            prompts: the text of each.
            rewards: by name, float32 [B]; NaN where a reward was not asked.
            advantages: [B]; 0 in a group without spread, NaN in one that a reward has failed, or of
                which a picture is lost.
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
    """The callbacks of a run, the trainer's own and the user's, called in order.

    Args:
        state: the state of the run.
        processes: agree on what is asked for.
    """

    def __init__(self, state: TrainerState, processes: Processes) -> None:
        self._callbacks: list[Callback] = []
        self._state, self._processes = state, processes
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
            if getattr(method, "__func__", None) is getattr(Callback, hook):
                continue  # not written: nothing has to be copied for it
            name = f"callback {type(callback).__name__}.{hook}"
            try:
                with user_code(name):
                    method(self._view, self.control, **own(what))
            except Exception as error:
                if isinstance(error, UserError):
                    raise UserError(f"{name}: {message(error)}") from error
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


def make_callbacks(given: Any, where: str) -> list[Callback]:
    """Make the callbacks of a trainer or of ``run.callbacks``.

    Args:
        given: one or several: objects, classes that need no arguments, or their names as
            ``package.module:Class`` or ``path/to/file.py:Class``.
        where: what errors call the place.

    Raises:
        UserError: one cannot be imported or made, or is no :class:`Callback`.
    """
    if not isinstance(given, Iterable) or isinstance(given, (str, type)):
        given = [given]
    return [
        _callback(resolve("callback", one), f"{where}: {one!r}")
        if isinstance(one, str)
        else _callback(one, where)
        for one in given
    ]


def _callback(found: Any, where: str) -> Callback:
    if isinstance(found, type):
        try:
            inspect.signature(found).bind()
        except TypeError as error:
            raise UserError(
                f"{where}: {error}; a class that takes arguments is given as an object, by "
                "Trainer(callbacks=[...])"
            ) from error
        found = make(found, {}, f"callback {found.__name__}", where)
    if not isinstance(found, Callback):
        kind = type(found).__name__
        raise UserError(f"{where}: {kind} is no callback; derive the class from dgpo.Callback")
    refuse_misspelt(type(found), Callback, where)
    refuse_signatures(type(found), Callback, where)
    return found
