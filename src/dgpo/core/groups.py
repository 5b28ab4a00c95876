"""A group is the samples of one prompt; its statistics turn rewards into advantages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dgpo.core.precision import widen
from dgpo.core.transfer import sent, taken


def _alone(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True, eq=False)
class Groups:
    """``Groups`` say which group each sample belongs to.

    A group has a number of its own and is never known by its prompt's text: a prompt that is drawn
    twice makes two groups.

    A group may be spread over several processes. Then every process uses the same numbers
    (``count`` is the number of groups everywhere), and ``reduce`` adds a tensor over the processes
    (an all-reduce with SUM of float and int64 tensors). Every method that sums is then collective:
    all processes must call it, in the same order.

    Args:
        index: the group number of each sample, int64 ``[B]``, values in ``[0, count)``, any order;
            on the CPU, where looking at it waits for no device.
        size: how many samples a whole group has, the G of the papers.
        count: how many groups there are, including those without a sample here.
        reduce: adds a tensor over the processes; by default there is one process.

    Raises:
        ValueError: ``index`` is not a vector of int64 in range, or ``size`` is below 1.

    >>> groups = Groups.contiguous(count=2, size=3)
    >>> groups.index
    tensor([0, 0, 0, 1, 1, 1])
    >>> rewards = torch.tensor([0.0, 0.5, 1.0, 1.0, 1.0, 1.0])
    >>> groups.mean(rewards)
    tensor([0.5000, 1.0000])
    >>> groups.normalize(rewards, eps=0)
    tensor([-1.2247,  0.0000,  1.2247,  0.0000,  0.0000,  0.0000])
    """

    index: Tensor
    size: int
    count: int
    reduce: Callable[[Tensor], Tensor] = _alone

    def __post_init__(self) -> None:
        if self.index.dim() != 1 or self.index.dtype != torch.int64:
            got = f"{self.index.dtype} {tuple(self.index.shape)}"
            raise ValueError(f"index must be an int64 vector, one group number a sample; got {got}")
        if self.size < 1 or self.count < 0:
            raise ValueError(f"size >= 1 and count >= 0 are needed, got {self.size}, {self.count}")
        if not self.index.numel():
            return
        first, last = torch.stack(self.index.aminmax()).tolist()
        if first < 0 or last >= self.count:
            got = f"{first}..{last}"
            raise ValueError(f"group numbers must lie in 0..{self.count - 1}, got {got}")

    @classmethod
    def contiguous(cls, count: int, size: int) -> Groups:
        """Make ``count`` groups of ``size`` samples, one after the other: 0 0 0 1 1 1 ..."""
        return cls(torch.arange(count).repeat_interleave(size), size, count)

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum over each group, over all processes.

        Args:
            x: ``[B, ...]``.

        Returns:
            ``[count, ...]``, zero for a group without samples.

        Raises:
            ValueError: ``x`` does not have one row a sample.
        """
        self._one_row_each(x)
        total = x.new_zeros(self.count, *x.shape[1:])
        return self.reduce(total.index_add(0, sent(self.index, x), x))

    def each(self, v: Tensor) -> Tensor:
        """Give each sample the value of its group: ``[count, ...] -> [B, ...]``.

        Raises:
            ValueError: ``v`` does not have one row a group.
        """
        if v.dim() == 0 or v.shape[0] != self.count:
            raise ValueError(f"expected {self.count} rows, one a group, got shape {tuple(v.shape)}")
        return taken(v, self.index)

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean over each group: ``[B] -> [count]``, in float32 (float64 stays).

        Raises:
            ValueError: a group is only partly here. An algorithm never means the statistics of a
                part of a group, and nothing later would show the mistake.
        """
        self._one_row_each(x)
        members = self.reduce(self.index.bincount(minlength=self.count))
        for group, count in enumerate(members.tolist()):
            if count not in (0, self.size):
                raise ValueError(
                    f"group {group} has {count} of its {self.size} samples here: group "
                    "statistics need whole groups (for a smaller micro-batch, compute the group "
                    "weights over whole groups first and pass them as Forward.weights)"
                )
        return self.sum(widen(x)) / self.size

    def std(self, x: Tensor) -> Tensor:
        """Return the population standard deviation of each group: ``[B] -> [count]``.

        It is computed in float64, in which no square of a float32 number is infinite.

        Raises:
            ValueError: a group is only partly here.
        """
        return self._std(widen(x).double()).to(widen(x).dtype)

    def normalize(
        self, x: Tensor, scale: Literal["group", "batch"] = "group", eps: float = 1e-4
    ) -> Tensor:
        """Return advantages ``A = (x - mean_group) / (std + eps std_within)``, which sum to 0 in
        each group.

        ``std_within`` is the deviation of all rewards from the means of their groups, so that the
        unit of the rewards has no influence: a group whose rewards differ by far less than those of
        the others gets small advantages, and no other. All is computed in float64.

        Differs from the papers: published code adds 1e-4 itself, which takes 9% of the advantages
        of rewards with a deviation of 1e-3, and 99.99% at 1e-8.

        Args:
            x: rewards ``[B]``.
            scale: ``"group"`` divides by the standard deviation of the group, ``"batch"`` by the
                one of all rewards of the batch (over all processes). Both are of the population.
            eps: the part of ``std_within`` that is added to the deviation.

        Returns:
            ``[B]``, float32 (float64 stays), exactly zero in a group whose members are all equal.

        Raises:
            ValueError: a group is only partly here, or ``scale`` is neither of the two.
        """
        if scale not in ("group", "batch"):
            raise ValueError(f"scale must be 'group' or 'batch', got {scale!r}")
        wide = widen(x).double()
        centred = wide - self.each(self.mean(wide))
        std = self.each(self._std(wide)) if scale == "group" else self._deviation(wide)
        normal = centred / (std + eps * self._deviation(centred))
        # rounding in the mean of equal rewards leaves a residue
        return torch.where(self.each(self.spread(x)), normal, 0).to(widen(x).dtype)

    def spread(self, x: Tensor) -> Tensor:
        """Tell whether the members of each group differ: ``[B] -> bool [count]``.

        The answer is exact, and needs sums alone over the processes: the bits of the numbers are
        cut into 16-bit integers h, and by Cauchy-Schwarz ``n * sum h^2 = (sum h)^2`` only if all h
        are equal. Both sides are exact in int64 for groups of up to 2^15 samples.
        """
        x = widen(x) + 0.0  # -0.0 becomes 0.0, the only two equal numbers that differ in bits
        bits = x.view(torch.int64 if x.dtype == torch.float64 else torch.int32)
        shifts = range(0, 8 * bits.element_size(), 16)
        parts = torch.stack([(bits >> shift) & 0xFFFF for shift in shifts], dim=1).long()
        columns = torch.cat([torch.ones_like(parts[:, :1]), parts, parts.square()], dim=1)
        members, first, second = self.sum(columns).split([1, len(shifts), len(shifts)], dim=1)
        return (members * second != first.square()).any(1)

    def rank(self, x: Tensor) -> Tensor:
        """Return the place of each sample in its group, 0 for the largest: ``[B] -> int64 [B]``.

        Among equal numbers the first in the batch gets the first place.

        Raises:
            ValueError: a group is not wholly in this process; sums cannot find places.
        """
        self._one_row_each(x)
        index = sent(self.index, x)
        members = index.bincount(minlength=self.count)
        if bool(((members != 0) & (members != self.size)).any()):
            raise ValueError(
                f"samples are ranked in whole groups of {self.size}, and one process must hold "
                "them; gather the numbers of all processes first"
            )
        order = x.argsort(descending=True, stable=True)
        order = order[index[order].argsort(stable=True)]  # group by group, best first
        first = members.cumsum(0) - members
        place = torch.arange(len(order), device=x.device) - first[index[order]]
        return torch.empty_like(place).scatter_(0, order, place)

    def subset(self, rows: Tensor) -> Groups:
        """Return the groups of some of the samples, numbered anew in their old order.

        ``rows`` may hold whole groups or parts. ``size`` stays the size of a whole group, so group
        statistics of a part raise. A group is left out only if no process holds a row of it, so the
        call is collective like the sums.

        Args:
            rows: positions in the batch, int64 ``[b]``.
        """
        index = self.index[rows.to(self.index.device)]
        present = self.reduce(index.bincount(minlength=self.count)) > 0
        number = present.long().cumsum(0) - 1
        return Groups(number[index], self.size, len(present.nonzero()), self.reduce)

    def _std(self, x: Tensor) -> Tensor:
        return self.mean((x - self.each(self.mean(x))).square()).sqrt()

    def _deviation(self, x: Tensor) -> Tensor:
        """Return the deviation of all samples from their mean."""
        samples = self.sum(torch.ones_like(x)).sum()
        mean = self.sum(x).sum() / samples
        return (self.sum((x - mean).square()).sum() / samples).sqrt()

    def _one_row_each(self, x: Tensor) -> None:
        if x.dim() == 0 or x.shape[0] != self.index.shape[0]:
            raise ValueError(
                f"expected {self.index.shape[0]} rows, one a sample, got shape {tuple(x.shape)}"
            )
