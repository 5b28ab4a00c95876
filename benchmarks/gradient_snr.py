"""Where does the group preference speak?  Signal to noise of its gradient, by kind of layer.

Groups are sampled with the recipe's settings and the gradient of ``mean_i A_i d_i`` is taken for
each group alone, for every weight of the denoiser.  What the groups' gradients share is signal:

    signal = |mean_g grad_g|^2, unbiased;   noise = mean_g |grad_g|^2 - signal;   snr = signal/noise

so an update from n groups has n times the printed ratio.  It says which layers to adapt and which
noise levels to train before a single training run is made::

    python benchmarks/gradient_snr.py --groups 48 --levels 2 3 4 -- KEY=VALUE ...

With ``--draws N`` the gradient of each group is taken N times, with a noise of its own each time,
and the variance of all weights together is divided into what the noise adds and what is left when
it is averaged away: the choice of pictures and prompts. It says what training on the same pictures
again can gain (``train.inner_epochs``).
"""

from __future__ import annotations

import argparse
import random
import re
from collections import defaultdict

import torch
from torch import Tensor

from dgpo.core.groups import Groups
from dgpo.core.process import Level
from dgpo.core.seeds import stream
from dgpo.models.load import load_pipeline
from dgpo.models.pipeline.adapter import PipelineModel
from dgpo.models.pipeline.prompt_encoder import Conditioning
from dgpo.models.policy import Policy
from dgpo.models.samplers.schedulers import make_scheduler
from dgpo.prompts import load_prompts
from dgpo.recipe import Recipe
from dgpo.rewards import load_rewards


def kind_of(name: str) -> str:
    """A parameter's name without the denoiser's and without block numbers."""
    return re.sub(r"\.\d+\.", ".*.", name.partition(".")[2])


def ratio(gradients: Tensor) -> float:
    """Signal to noise of group gradients ``[groups, parameters]``, for one group."""
    count = len(gradients)
    power = gradients.square().sum(1)
    together = gradients.sum(0).square().sum()
    signal = (together - power.sum()) / (count * (count - 1))
    return float(signal / (power.mean() - signal))


def divided(gradients: Tensor) -> tuple[float, float, float]:
    """Squared signal, variance by the pictures and variance by the noise of the gradient of one
    group, from gradients ``[groups, draws, parameters]``; all unbiased."""
    groups, draws, _ = gradients.shape
    by_noise = float(gradients.var(1).sum(-1).mean())
    means = gradients.mean(1)
    between = float(means.var(0).sum())
    signal = float(means.mean(0).square().sum()) - between / groups
    return signal, between - by_noise / draws, by_noise


def collect(
    model: PipelineModel, recipe: Recipe, groups: int
) -> tuple[Tensor, Conditioning, Tensor, list[Level]]:
    """Clean samples, conditioning and advantages of ``groups`` groups, and the schedule."""
    size = recipe.group_size
    prompts = random.Random(recipe.seed).sample(load_prompts(recipe.prompts.train), groups)
    rows = [prompt for prompt in prompts for _ in range(size)]
    guidance = recipe.rollout.guidance_scale
    cond = model.encode([row.text for row in rows], guidance=guidance != 1)
    scheduler = make_scheduler(recipe.rollout.scheduler, model.pipe.scheduler)
    rollout = model.rollout(
        cond,
        steps=recipe.rollout.steps,
        guidance_scale=guidance,
        scheduler=scheduler,
        generators=[stream(recipe.seed, "snr", row) for row in range(len(rows))],
    )
    assert rollout.images is not None
    rewards = load_rewards(recipe.rewards)(rollout.images, rows).total
    advantages = recipe.algorithm.advantages(rewards, Groups.contiguous(groups, size))
    print(f"reward {rewards.mean():.3f}, spread {(advantages != 0).float().mean():.0%}")
    return rollout.x0, cond, advantages, rollout.levels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="pocket-geneval")
    parser.add_argument("--groups", type=int, default=48)
    parser.add_argument("--levels", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--draws", type=int, default=1, help="of the noise, for each group")
    parser.add_argument("overrides", nargs="*", help="a.b=c")
    options = parser.parse_args()
    recipe = Recipe.load(options.recipe, options.overrides)
    model = PipelineModel(load_pipeline(recipe.model), call=recipe.rollout.call)
    policy = Policy(model, None, recipe.seed)
    x0, cond, advantages, levels = collect(model, recipe, options.groups)
    kinds = defaultdict(list)
    for index, name in enumerate(policy._named):
        kinds[kind_of(name)].append(index)
    for number in options.levels:
        level = levels[number]
        print(f"level {number} (sigma {level.sigma:.3f})")
        found = [
            [
                gradients(policy, x0[rows], cond.rows(rows), advantages[rows], level, noise)
                for noise in (
                    torch.randn(1, *x0.shape[1:], generator=stream(recipe.seed, number, *place))
                    for place in [(group,), *((group, n) for n in range(1, options.draws))]
                )
            ]
            for group, rows in enumerate(torch.arange(len(x0)).split(recipe.group_size))
        ]
        if options.draws > 1:
            every = torch.stack([torch.stack([flat(one) for one in group]) for group in found])
            signal, pictures, noise = divided(every)
            print(f"  signal^2 {signal:.3g}, variance by pictures {pictures:.3g}", end="")
            print(f", by noise {noise:.3g} ({noise / (pictures + noise):.0%} of the variance)")
            continue
        rows_of = {
            kind: torch.stack([torch.cat([one[i].flatten() for i in where]) for (one,) in found])
            for kind, where in kinds.items()
            if kind.endswith("weight") and found[0][0][where[0]].ndim > 1
        }
        for kind, of_groups in sorted(rows_of.items(), key=lambda item: -ratio(item[1])):
            print(f"  {kind:<48} {ratio(of_groups):8.4f}  of {of_groups.shape[1]:>7} weights")


def gradients(
    policy: Policy, x0: Tensor, cond: Conditioning, advantages: Tensor, level: Level, noise: Tensor
) -> list[Tensor]:
    """Of ``mean_i A_i d_i`` of one group at one level, for every weight."""
    process, noise = policy.model.process, noise.expand_as(x0)
    xt = process.corrupt(x0, noise, level)
    error = (policy.predict(xt, level, cond) - process.target(x0, noise, level)).square()
    loss = (advantages * error.flatten(1).mean(1)).mean()
    parameters = policy.parameters()
    parts = torch.autograd.grad(loss, parameters, allow_unused=True)
    pairs = zip(parts, parameters, strict=True)
    return [torch.zeros_like(p) if g is None else g for g, p in pairs]


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


if __name__ == "__main__":
    main()
