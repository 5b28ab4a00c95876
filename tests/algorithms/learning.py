"""A task of two dimensions that an algorithm on noised samples learns in a few seconds.

The base model is exact: for x0 and e ~ N(0, I) the optimal velocity is a known multiple of x.
A network that starts at zero is added to it and moved towards a point.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from dgpo.algorithms import Algorithm
from dgpo.core import FlowMatching, Forward, Groups, Level

STEPS = 8
COUNT, SIZE = 4, 16
GOAL = torch.tensor([1.5, -1.0])


class Velocity(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 2))
        nn.init.zeros_(self.net[2].weight)
        nn.init.zeros_(self.net[2].bias)

    def forward(self, xt: Tensor, s: float) -> Tensor:
        base = (2 * s - 1) / ((1 - s) ** 2 + s**2) * xt
        return base + self.net(torch.cat([xt, torch.full_like(xt[:, :1], s)], 1))


def schedule() -> list[Level]:
    sigmas = [(STEPS - i) / STEPS for i in range(STEPS)]
    return [Level(torch.tensor(1000 * s), s) for s in sigmas]


@torch.no_grad()
def rollout(model: Velocity, count: int, generator: torch.Generator) -> Tensor:
    x = torch.randn(count, 2, generator=generator)
    for level in schedule():
        x = x - model(x, level.sigma) / STEPS
    return x


def reward(x0: Tensor) -> Tensor:
    return -(x0 - GOAL).norm(dim=1)


def mean_reward(model: Velocity) -> float:
    return float(reward(rollout(model, 512, torch.Generator().manual_seed(1))).mean())


def train(algorithm: Algorithm, iterations: int, step_each_level: bool = False) -> Velocity:
    """What collection and update do, in a few lines."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    process, everyone, levels = FlowMatching(), Groups.contiguous(COUNT, SIZE), schedule()
    policy = Velocity()
    ref, old = copy.deepcopy(policy), copy.deepcopy(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)

    @torch.no_grad()
    def move(decay: float) -> None:
        for slow, now in zip(old.parameters(), policy.parameters(), strict=True):
            slow.lerp_(now, 1 - decay)

    steps = 0
    for iteration in range(iterations):
        model = old if algorithm.samples_from == "old" else policy
        x0 = rollout(model, COUNT * SIZE, generator)
        advantages = algorithm.advantages(reward(x0), everyone)
        size = algorithm.trained_per_group or SIZE
        rows = (advantages.nonzero()[:, 0]) if size != SIZE else torch.arange(COUNT * SIZE)
        x0, advantages = x0[rows], advantages[rows]
        groups = replace(everyone.subset(rows), size=size)
        chosen = algorithm.timesteps.choose(levels, generator)
        for order, i in enumerate(chosen):
            level = levels[i]
            noise = groups.each(torch.randn(COUNT, 2, generator=generator))
            xt = process.corrupt(x0, noise, level)
            with torch.no_grad():
                at_ref, at_old = ref(xt, level.sigma), old(xt, level.sigma)
            points = Forward(
                x0=x0,
                noise=noise,
                xt=xt,
                target=process.target(x0, noise, level),
                level=level,
                process=process,
                pred=policy(xt, level.sigma),
                ref=at_ref if "ref" in algorithm.snapshots else None,
                old=at_old if "old" in algorithm.snapshots else None,
                kl_ref=at_ref if algorithm.kl_guidance is not None else None,
                advantages=advantages,
                groups=groups,
            )
            algorithm.loss(points)[0].backward()
            if step_each_level or order == len(chosen) - 1:
                optimizer.step()
                optimizer.zero_grad()
                if algorithm.old_moves == "step":
                    move(algorithm.old_decay(steps))
                steps += 1
        if algorithm.old_moves == "iteration":
            move(algorithm.old_decay(iteration))
    return policy
