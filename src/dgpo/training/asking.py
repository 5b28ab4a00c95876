"""What an algorithm is asked for, and the one clear error where a user's answers something else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dgpo.algorithms.base import Algorithm, BaseAlgorithm, TrajectoryAlgorithm
from dgpo.core.groups import Groups
from dgpo.core.points import Forward, Trajectory
from dgpo.errors import UserError, message, told
from dgpo.user_code import user_code

TAKEN = {"iteration", "loss", "grad_norm", "nonfinite_steps", "reward_mean", "reward_std", "spread",
         "groups_dropped", "groups_skipped", "samples_lost", "seconds", "images", "forwards",
         "backwards"}  # fmt: skip
"""The columns of ``metrics.jsonl`` that no figure of a loss may have the name of."""


def advantages_of(algorithm: BaseAlgorithm, rewards: Tensor, groups: Groups) -> Tensor:
    """The advantages [B] of rewards [B].

    Raises:
        UserError: a user's class raised, or answered something else.
    """
    with _theirs(algorithm, "advantages") as name:
        found = algorithm.advantages(rewards, groups)
    if name:
        _refuse_column(name, found, "rewards", len(rewards))
        if not bool(torch.isfinite(found).all()):
            bad = int((~torch.isfinite(found)).nonzero()[0])
            raise UserError(
                f"{name} returned {float(found[bad])} for the reward {float(rewards[bad]):g} (row "
                f"{bad}); every advantage must be finite: groups.normalize(rewards, 'group', "
                "eps=1e-4) does not divide by a deviation of 0"
            )
    return found


def weights_of(algorithm: Algorithm, points: Forward) -> Tensor:
    """The weights [B] of the groups of points.

    Raises:
        UserError: a user's class raised, or answered something else.
    """
    with _theirs(algorithm, "weights") as name:
        found = algorithm.weights(points)
    if name:
        _refuse_column(name, found, "points.advantages", len(points.advantages))
    assert found is not None
    return found


def loss_of(
    algorithm: Algorithm | TrajectoryAlgorithm, points: Any
) -> tuple[Tensor, dict[str, Any]]:
    """The loss of points and its figures; ``points`` are those of the algorithm's kind.

    Raises:
        UserError: a user's class raised, or answered something else.
    """
    with _theirs(algorithm, "loss") as name:
        answer = algorithm.loss(points)
    if name:
        _refuse_loss(name, answer, points)
    return answer


@contextmanager
def _theirs(algorithm: BaseAlgorithm, method: str) -> Iterator[str]:
    """Run a method inside the block; gives what errors call it, or nothing for one of ours."""
    kind = type(algorithm)
    if kind.__module__.partition(".")[0] == "dgpo":
        yield ""
        return
    name = f"algorithm {kind.__name__}.{method}"
    try:
        with user_code(name):
            yield name
    except torch.OutOfMemoryError:  # where more memory is needed is no fault of the class
        raise
    except UserError as error:
        raise UserError(f"{name}: {message(error)}") from error
    except Exception as error:
        raise UserError(f"{name} raised {told(error)}") from error


def _refuse_column(name: str, found: Any, of: str, rows: int) -> None:
    if not isinstance(found, Tensor) or found.shape != (rows,) or not found.is_floating_point():
        raise UserError(
            f"{name} returned {_kind(found)}; it must return a tensor of floats of shape [{rows}], "
            f"one for each of {of}"
        )


def _refuse_loss(name: str, answer: Any, points: Forward | Trajectory) -> None:
    if not isinstance(answer, tuple) or len(answer) != 2 or not isinstance(answer[1], dict):
        raise UserError(
            f"{name} returned {_kind(answer)}; it must return a pair, the loss and a dict of "
            "figures: return loss, {} (or {'error': error.detach().mean()})"
        )
    loss, figures = answer
    if not isinstance(loss, Tensor) or loss.shape != () or not loss.is_floating_point():
        raise UserError(
            f"{name} returned {_kind(loss)} as the loss; it must be a tensor of one float without "
            "dimensions, the mean over the samples: loss.mean()"
        )
    if points.pred.requires_grad and not loss.requires_grad:
        raise UserError(
            f"{name} returned a loss without a gradient, from which nothing can be learned; "
            "compute it with torch from points.pred, without detach(), numpy or torch.no_grad()"
        )
    for key, value in figures.items():
        one = isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1)
        if not isinstance(key, str) or not one:
            raise UserError(
                f"{name} returned the figure {key!r:.80} as {_kind(value)}; a figure is one "
                "number under a text: error.detach().mean()"
            )
        if key in TAKEN or key.startswith("seconds_"):
            raise UserError(
                f"{name} returned a figure {key!r}, which the run itself writes down; give it "
                "another name"
            )


def _kind(value: Any) -> str:
    """What a value is, in a few words."""
    if isinstance(value, Tensor):
        kind = str(value.dtype).removeprefix("torch.")
        return f"a tensor of {kind} of shape {list(value.shape)}"
    if isinstance(value, tuple) and value:
        return f"a tuple of {', '.join(_kind(one) for one in value[:3])}"
    if (shape := getattr(value, "shape", None)) is not None:
        return f"{type(value).__module__}.{type(value).__name__} of shape {list(shape)}"
    return "None" if value is None else f"{type(value).__name__} {value!r:.60}"
