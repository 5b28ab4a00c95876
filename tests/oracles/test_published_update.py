"""DGPO's whole update, written down a second time from the published mathematics, in float64.

Source: arXiv 2510.08425 (frozen reference), arXiv 2603.07700 (EMA reference). Nothing of the
package computes what is expected: not the noising, the guidance, the loss, the clipping of
gradients, AdamW, nor the two averages. Only the random levels and noises are taken from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from dgpo.core.groups import Groups
from dgpo.core.process import Level
from dgpo.models.pipeline.adapter import PipelineModel
from dgpo.models.policy import Policy
from dgpo.recipe import Recipe
from dgpo.training.batch import Batch
from dgpo.training.updater import Updater
from families.tiny import sd3_small
from tiny_runs import PROMPTS, Calls, Spy, settings

GROUPS, SIZE, LEVELS, ITERATIONS = 4, 4, 2, 3
MICRO = 2
"""The micro-batches of an iteration: two whole groups each."""
PUBLISHED: dict[str, Any] = {"beta": 100.0, "kl": 0.02, "kl_cfg": 1.0, "advantage_std": "group"}
FREE: dict[str, Any] = {**PUBLISHED, "kl_cfg": 4.5, "advantage_std": "batch"}
MODES: dict[str, dict[str, Any]] = {
    "guided rollouts": PUBLISHED,
    "free, frozen reference": FREE,
    "free, frozen reference, plain margin": {**FREE, "baseline": "plain"},
    "free, EMA reference": {**PUBLISHED, "beta": 2000.0, "reference": "ema"},
}
CLIP = 1e-6
"""Narrower than published: three steps do not lead far."""
LR, BETAS, DECAY, NORM = 3e-4, (0.9, 0.999), 1e-4, 0.05
OLD_RATE, OLD_MAX, SLOW, EVERY = 0.1, 0.15, 0.9, 2
Weights = dict[str, Tensor]
Draw = tuple[Tensor, float, Tensor]
"""The timestep, the noise level and the noises [B, ...] of a trained level."""


class Published:
    """Trains weights as the published runs do.

    Args:
        denoiser: the network; its own weights are where training begins.
        cond: the embeddings of the groups, with and without the prompt.
        mode: the settings of the algorithm.
    """

    def __init__(self, denoiser: torch.nn.Module, cond: Weights, mode: dict[str, Any]) -> None:
        self.denoiser, self.cond, self.mode = denoiser, cond, mode
        own = dict(denoiser.named_parameters())
        self.base, self.old, self.slow = (
            {k: p.detach().clone() for k, p in own.items()} for _ in "123"
        )
        self.theta = {k: p.detach().clone().requires_grad_() for k, p in own.items()}
        self.first = {k: torch.zeros_like(p) for k, p in self.base.items()}
        self.second = {k: torch.zeros_like(p) for k, p in self.base.items()}
        self.step, self.clipped = 0, 0

    def velocity(
        self, weights: Weights, xt: Tensor, t: Tensor, rows: Tensor, scale: float
    ) -> Tensor:
        """v without guidance, or v_without + scale (v_with - v_without)."""

        def call(prefix: str) -> Tensor:
            given = {
                "hidden_states": xt,
                "timestep": t.expand(len(xt)),
                "encoder_hidden_states": self.cond[f"{prefix}prompt_embeds"][rows // SIZE],
                "pooled_projections": self.cond[f"{prefix}pooled_prompt_embeds"][rows // SIZE],
                "return_dict": False,
            }
            return functional_call(self.denoiser, weights, (), given)[0]

        if scale == 1:
            return call("")
        without = call("negative_")
        return without + scale * (call("") - without)

    def loss(self, x0: Tensor, advantages: Tensor, draw: Draw, rows: Tensor) -> Tensor:
        """The loss of a micro-batch at one level."""
        mode, (t, sigma, noises) = self.mode, draw
        clean, noise, a = x0[rows], noises[rows], advantages[rows]
        xt = (1 - sigma) * clean + sigma * noise

        def error(v: Tensor) -> Tensor:
            return ((v - (noise - clean)) ** 2).mean((1, 2, 3))

        with torch.no_grad():
            ref = self.velocity(self.base, xt, t, rows, mode["kl_cfg"])
            old = error(self.velocity(self.old, xt, t, rows, 1))
            margin = error(ref)
            if mode.get("baseline") == "plain":
                margin = error(self.velocity(self.base, xt, t, rows, 1))
            if mode.get("reference") == "ema":
                margin = old
        v = self.velocity(self.theta, xt, t, rows, 1)
        d = error(v)
        terms = []
        for group in (rows // SIZE).unique():
            mine = rows // SIZE == group
            s = mode["beta"] / SIZE * (a[mine] * (d[mine] - margin[mine])).sum().detach()
            weight = 1 / (1 + torch.exp(-s))
            for i in mine.nonzero()[:, 0]:
                ratio, clip = torch.exp(old[i] - d[i]).detach(), CLIP
                done = ratio > 1 + clip if a[i] > 0 else ratio < 1 - clip
                self.clipped += int(done)
                terms.append(weight * a[i] * (d[i].detach() if done else d[i]))
        return torch.stack(terms).mean() + mode["kl"] * ((v - ref) ** 2).mean()

    def iteration(self, x0: Tensor, advantages: Tensor, draws: Sequence[Draw]) -> None:
        """One optimiser step, its gradient accumulated over micro-batches and levels."""
        gradient = {k: torch.zeros_like(p) for k, p in self.base.items()}
        for rows in torch.arange(GROUPS * SIZE).chunk(MICRO):
            for draw in draws:
                part = self.loss(x0, advantages, draw, rows) / (MICRO * LEVELS)
                found = torch.autograd.grad(part, list(self.theta.values()), allow_unused=True)
                for name, one in zip(self.theta, found, strict=True):
                    gradient[name] += 0 if one is None else one
        norm = sum((g**2).sum() for g in gradient.values()) ** 0.5
        assert norm > NORM
        self.step += 1
        with torch.no_grad():
            for name, p in self.theta.items():
                self._adamw(name, p, gradient[name] * NORM / (norm + 1e-6))
            before = self.step - 1
            self._move(self.old, min(OLD_MAX, OLD_RATE * before))
            if self.step % EVERY == 0:
                for _ in range(MICRO):
                    self._move(self.slow, min((1 + before) / (10 + before), SLOW))

    def _adamw(self, name: str, p: Tensor, g: Tensor) -> None:
        one, two = BETAS
        self.first[name] = one * self.first[name] + (1 - one) * g
        self.second[name] = two * self.second[name] + (1 - two) * g**2
        mean = self.first[name] / (1 - one**self.step)
        size = (self.second[name] / (1 - two**self.step)).sqrt()
        p.copy_(p - LR * DECAY * p - LR * mean / (size + 1e-8))

    def _move(self, average: Weights, decay: float) -> None:
        for name, p in self.theta.items():
            average[name] = decay * average[name] + (1 - decay) * p.detach()


def published_advantages(rewards: Tensor, std: str) -> Tensor:
    """(r - mean of the group) / (deviation of the group or of all + 1e-4 s), clipped to 5.

    The published constant has no factor s, the deviation within all groups: it is the one line
    in which the unit of the reward would count.
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    own = rewards.std(1, correction=0, keepdim=True)
    return (
        (
            centred
            / (
                (own if std == "group" else rewards.std(correction=0))
                + 1e-4 * centred.square().mean().sqrt()
            )
        )
        .clamp(-5, 5)
        .flatten()
    )


class Ours:
    """The package's update of the same denoiser, full of weights in float64."""

    def __init__(self, mode: dict[str, Any], micro_batch: int) -> None:
        train = {"lr": LR, "betas": BETAS, "weight_decay": DECAY, "max_grad_norm": NORM}
        averages = {"old_decay_rate": OLD_RATE, "old_decay_max": OLD_MAX, "clip": CLIP}
        timesteps = {"count": LEVELS, "indices": (0, 2)}
        data = settings(
            group_size=SIZE,
            groups_per_iteration=GROUPS,
            lora=None,
            train={**train, "micro_batch": micro_batch},
            ema={"decay": SLOW, "every": EVERY, "moves": MICRO, "warmup": "steps"},
        )
        spy = Spy(timesteps=timesteps, **averages, **mode)
        self.recipe = Recipe.from_dict({**data, "algorithm": spy})
        self.model = PipelineModel(sd3_small().to(torch.float64), call=self.recipe.rollout.call)
        self.policy = Policy(self.model, None)
        self.updater = Updater(self.policy, self.recipe)
        self.cond = self.model.encode(PROMPTS[:GROUPS], guidance=True)
        self.model.has_guidance(self.cond)  # finds out by a call of its own

    def iteration(self, x0: Tensor, rewards: Tensor, number: int) -> list[Draw]:
        """Train; returns the levels and noises that were drawn."""
        groups = Groups.contiguous(GROUPS, SIZE)
        sigmas = [3 * s / (1 + 2 * s) for s in (1.0, 0.5005, 0.001)]
        batch = Batch(
            x0=x0,
            prompts=self.cond,
            levels=[Level(torch.tensor(1000 * s), s) for s in sigmas],
            advantages=self.recipe.algorithm.advantages(rewards.flatten(), groups),
            groups=groups,
            positions=torch.arange(GROUPS * SIZE),
            total=GROUPS * SIZE,
        )
        Spy.seen.clear()
        self.updater.update(batch, number)
        draws: dict[float, list[Any]] = {}
        for points in Spy.seen:
            draws.setdefault(points.level.sigma, []).append(points)
        assert len(draws) == LEVELS
        return [
            (seen[0].level.timestep, sigma, torch.cat([points.noise.double() for points in seen]))
            for sigma, seen in draws.items()
        ]


def largest(ours: Sequence[Tensor], theirs: Weights) -> float:
    return max(
        float((a - b).detach().abs().max()) for a, b in zip(ours, theirs.values(), strict=True)
    )


@pytest.mark.parametrize(("mode", "micro_batch"), zip(MODES, (8, 3, 8, 3), strict=True))
def test_the_update_is_the_published_one(mode: str, micro_batch: int) -> None:
    """Micro-batches of three cut groups, those of eight hold two."""
    ours = Ours(MODES[mode], micro_batch)
    cond = {k: v for k, v in ours.cond.call_kwargs(True).items() if isinstance(v, Tensor)}
    theirs = Published(sd3_small().to(torch.float64).transformer.eval(), cond, MODES[mode])
    start = {name: p.clone() for name, p in theirs.base.items()}
    generator = torch.Generator().manual_seed(3)
    for number in range(ITERATIONS):
        x0 = torch.randn(GROUPS * SIZE, 4, 8, 8, generator=generator, dtype=torch.float64)
        rewards = torch.randn(GROUPS, SIZE, generator=generator, dtype=torch.float64)
        rewards[1] = 0.25  # equal rewards: this group is trained for its KL term alone
        draws = ours.iteration(x0, rewards, number)
        theirs.iteration(x0, published_advantages(rewards, MODES[mode]["advantage_std"]), draws)
    policy = ours.policy
    assert largest(policy.parameters(), start) > 1e-4
    assert 0 < theirs.clipped < ITERATIONS * LEVELS * GROUPS * SIZE
    assert largest(policy.parameters(), theirs.theta) < 1e-12
    assert largest(policy.old.tensors, theirs.old) < 1e-12
    assert largest(policy.slow.tensors, theirs.slow) < 1e-12


@pytest.mark.parametrize(("baseline", "reference"), [("guided", 2), ("plain", 3)])
def test_one_guided_pass_of_the_reference_serves_margin_and_kl(
    baseline: str, reference: int
) -> None:
    """Counted in rows: guidance takes two of each sample. The policy and the old one take two."""
    mode = {**PUBLISHED, "kl_cfg": 4.5, "baseline": baseline}
    ours = Ours(mode, micro_batch=8)
    generator = torch.Generator().manual_seed(3)
    x0 = torch.randn(GROUPS * SIZE, 4, 8, 8, generator=generator, dtype=torch.float64)
    rewards = torch.randn(GROUPS, SIZE, generator=generator, dtype=torch.float64)
    with Calls(ours.model.denoisers["transformer"]) as calls:
        ours.iteration(x0, rewards, 0)
    assert sum(calls.sizes) == GROUPS * SIZE * LEVELS * (2 + reference)
