"""A linear denoiser in float64 and a fake group of processes, for tests of losses."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from dgpo.core import FlowMatching, Forward, Groups, Level

LEVEL = Level(torch.tensor(700.0), 0.7)


class Toy:
    """Points whose predictions are ``xt @ W``, with W for the policy, the reference and the old."""

    def __init__(self, groups: Groups, seed: int = 0, dims: int = 5, spread: float = 0.3) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        batch = groups.index.shape[0]
        process = FlowMatching()
        self.groups = groups
        self.x0 = normal(batch, 2, dims)
        self.noise = groups.each(normal(groups.count, 2, dims))
        self.xt = process.corrupt(self.x0, self.noise, LEVEL)
        self.target = process.target(self.x0, self.noise, LEVEL)
        self.ref = normal(dims, dims)
        self.policy = (self.ref + spread * normal(dims, dims)).requires_grad_()
        self.old = self.policy.detach() + 0.1 * spread * normal(dims, dims)
        self.advantages = groups.normalize(normal(batch))

    def points(
        self,
        rows: Tensor | None = None,
        groups: Groups | None = None,
        weights: Tensor | None = None,
        **changes: Tensor | None,
    ) -> Forward:
        rows = torch.arange(len(self.x0)) if rows is None else rows
        xt = self.xt[rows]
        fields = {
            "ref": xt @ self.ref,
            "old": xt @ self.old,
            "kl_ref": None,
            "advantages": self.advantages[rows],
            **changes,
        }
        return Forward(
            x0=self.x0[rows],
            noise=self.noise[rows],
            xt=xt,
            target=self.target[rows],
            level=LEVEL,
            process=FlowMatching(),
            pred=xt @ self.policy,
            groups=groups or Groups(self.groups.index[rows], self.groups.size, self.groups.count),
            weights=weights,
            **fields,
        )

    def errors(self) -> tuple[Tensor, Tensor]:
        """d with gradient and d_ref, both ``[B]``, by the definition."""
        points = self.points()
        error = (points.pred - points.target).square().mean((1, 2))
        return error, (self.xt @ self.ref - self.target).square().mean((1, 2))

    def gradient(self, loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, self.policy)[0]


def run_processes(body: Callable[[int, Callable[[Tensor], Tensor]], Tensor], count: int) -> list:
    """``body(rank, reduce)`` in ``count`` threads, where reduce adds over the threads."""
    barrier = threading.Barrier(count, timeout=20)
    slots: list[Tensor | None] = [None] * count
    results: list[Tensor | BaseException | None] = [None] * count

    def reduce_of(rank: int) -> Callable[[Tensor], Tensor]:
        def reduce(x: Tensor) -> Tensor:
            slots[rank] = x
            barrier.wait()
            total = torch.stack([slot for slot in slots if slot is not None]).sum(0)
            barrier.wait()
            return total

        return reduce

    def run(rank: int) -> None:
        try:
            results[rank] = body(rank, reduce_of(rank))
        except BaseException as error:
            barrier.abort()
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results
