"""Several rewards as one: which prompt asks which, and how their numbers are combined."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dgpo.core.groups import Groups
from dgpo.errors import UserError
from dgpo.prompts import Prompt
from dgpo.registry import nearest

COLUMN = "rewards"
"""The key under which a prompt row names its rewards: a list of names, or names and weights."""
Combine = Literal["sum", "gdpo"]
CANCELLED = 1e-6
"""Parts cancel if their sum is smaller than this part of them: float32 rounds to 6e-8."""
ROUNDING = 2.0**-23
"""The largest distance of two neighbours in float32, in parts of their size."""


def routed(prompts: Sequence[Prompt], weights: Mapping[str, float]) -> Tensor:
    """The weight of each reward for each row, float64 [B, K]; 0 where a row does not ask it.

    Args:
        prompts: B rows; a row without the column ``rewards`` asks all rewards.
        weights: the K rewards' weights, as in the recipe.

    Raises:
        UserError: a row names a reward that the run does not have, or gives a weight that is none.
    """
    table = torch.zeros(len(prompts), len(weights), dtype=torch.float64)
    for row, prompt in enumerate(prompts):
        own = _of_row(prompt, weights)
        table[row] = torch.tensor([own.get(name, 0.0) for name in weights], dtype=torch.float64)
    return table


def _of_row(prompt: Prompt, weights: Mapping[str, float]) -> Mapping[str, float]:
    given: Any = prompt.metadata.get(COLUMN)
    if given is None:
        return weights
    where = f"prompt {prompt.text!r:.80}: {COLUMN} = {given!r:.80}"
    if isinstance(given, (list, tuple)):
        given = dict.fromkeys(given)
        for name in given:
            given[name] = weights.get(name)
    elif isinstance(given, Mapping):
        # a table of rows fills the names that a row has not with None
        given = {name: value for name, value in given.items() if value is not None}
    else:
        raise UserError(f"{where}: should be a list of names, or names and weights")
    for name in given:
        if name not in weights:
            valid = ", ".join(weights)
            raise UserError(
                f"{where}: the run has no reward {name!r}{nearest(name, weights)}; it has {valid}"
            )
    if not given or not all(_is_weight(value) for value in given.values()):
        raise UserError(f"{where}: needs at least one name, and finite weights other than 0")
    return given


def _is_weight(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value) and value != 0


@dataclass(frozen=True)
class Mixed:
    """What an algorithm learns from, and the figures about it."""

    total: Tensor
    """Weighted sum of the rewards, float32 [B]."""
    merit: Tensor
    """What the algorithm ranks by, float32 [B]: ``total``, or the combined advantage of GDPO."""
    figures: dict[str, float]
    """``reward/NAME`` is the mean. Where there are several rewards, ``reward_spread/NAME`` is the
    mean deviation within a group, and ``advantage_share/NAME`` is ``sum A_k A / sum A^2`` with A
    the sum of the parts A_k: the shares add up to 1, and a reward below 0 was outvoted. Where the
    parts cancel everywhere it is ``sum A_k^2`` over that of all parts."""
    rounded: list[str]
    """The rewards that differ within some group by no more than float32 rounds their numbers."""


def mix(
    by_name: Mapping[str, Tensor], weights: Tensor, groups: Groups, combine: Combine = "sum"
) -> Mixed:
    """Combine the rewards of whole groups, in float64.

    ``sum``: the weighted sum. ``gdpo`` (Liu et al., 2026, GDPO): ``A_k`` is reward k standardized
    within its group, ``A = sum_k w_k A_k`` is standardized over the batch. Both leave the sum
    over each group of what is above its mean at 0. A group whose parts cancel, as those of two
    opposite rewards do, has no spread: what rounding leaves of them is no preference.

    Args:
        by_name: each reward's numbers, [B]; NaN where it was not asked.
        weights: [B, K] of :func:`routed`.
        groups: the groups of the rows.
        combine: ``sum`` or ``gdpo``.

    Raises:
        UserError: a weighted sum is infinite in float32.
    """
    asked = weights != 0
    numbers = torch.stack([value.double() for value in by_name.values()], dim=1)
    numbers = torch.where(asked, numbers, 0.0)
    # one by one and stacked: the rewards are summed in their own order
    total = (weights * numbers).T.contiguous().sum(0).float()
    if not bool(total.isfinite().all()):
        row = int((~total.isfinite()).nonzero()[0])
        named = zip(by_name, weights[row].tolist(), numbers[row].tolist(), strict=True)
        said = " + ".join(f"{weight:g} x {name} {number:g}" for name, weight, number in named)
        raise UserError(
            f"rewards: the weighted sum of a picture, {said}, is infinite in float32; give smaller "
            "weights, or rewards in larger units"
        )
    columns = range(len(by_name))
    if combine == "gdpo":
        own = torch.stack([groups.normalize(numbers[:, k]) for k in columns], dim=1)
    else:
        own = torch.stack([_centred(numbers[:, k], groups) for k in columns], dim=1)
    parts = weights * own
    whole = parts.sum(1)
    cancels = groups.each(
        groups.sum(whole.square()) <= CANCELLED**2 * groups.sum(parts.square().sum(1))
    )
    whole = torch.where(cancels, 0.0, whole)
    if combine == "gdpo":
        merit = groups.normalize(whole, "batch").float()
    else:
        merit = torch.where(cancels, groups.each(groups.mean(total)), total)
    figures = {}
    with_whole = whole[:, None] if bool(whole.any()) else parts
    shares = (parts * with_whole).sum(0) / (parts * with_whole).sum()
    for k, (name, value) in enumerate(by_name.items()):
        figures[f"reward/{name}"] = float(value[asked[:, k]].double().mean())
        if len(by_name) > 1:
            with_it = groups.sum(asked[:, k].double()) > 0
            figures[f"reward_spread/{name}"] = float(groups.std(numbers[:, k])[with_it].mean())
            figures[f"advantage_share/{name}"] = float(shares[k])
    rounded = [name for k, name in enumerate(by_name) if _rounded(numbers[:, k], groups)]
    return Mixed(total, merit, figures, rounded)


def _rounded(x: Tensor, groups: Groups) -> bool:
    size = groups.mean(x.square()).sqrt()
    return bool((groups.spread(x) & (groups.std(x) <= ROUNDING * size)).any())


def _centred(x: Tensor, groups: Groups) -> Tensor:
    return x - groups.each(groups.mean(x))
