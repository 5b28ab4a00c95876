"""How much of the rewards' time is hidden behind the sampling of the next pictures.

    python benchmarks/reward_overlap.py [--recipe R] [--rounds 3] [--share 0.5] [key=value ...]

The same iteration is collected in turn without and with ``rollout.overlap_rewards``, in one
process, so that what slows the machine slows both. The reward waits, as one on a server or a GPU
of its own does, for ``--share`` of the time that sampling its pictures takes. Hidden is the part
of the time spent in rewards that the collection did not wait for; the last batch has nothing to
hide behind, so that with N batches no more than (N - 1) / N can be hidden.

    python benchmarks/reward_overlap.py --train 6 [--share 1.0] [key=value ...]

trains so many iterations without and with ``rollout.ahead=1``: rewards are then asked while
the policy is trained, too.
"""

from __future__ import annotations

import argparse
import time
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from dgpo.models.load import load_pipeline
from dgpo.models.pipeline.adapter import PipelineModel
from dgpo.models.policy import Policy
from dgpo.prompts import PromptSampler, load_prompts
from dgpo.recipe import Recipe
from dgpo.rewards import load_rewards
from dgpo.trainer import Trainer
from dgpo.training.collector import Collector


class Waiting:
    """A reward that takes ``seconds`` for each picture and computes nothing."""

    __name__ = "waiting"

    def __init__(self) -> None:
        self.seconds, self.spent = 0.0, 0.0

    def __call__(self, images: list[Any], prompts: list[str]) -> list[float]:
        began = time.perf_counter()
        time.sleep(self.seconds * len(images))
        self.spent += time.perf_counter() - began
        return [float(place) for place in range(len(images))]


def train(recipe: str, iterations: int, share: float, settings: list[str]) -> None:
    """Train with a reward that waits, without and with pictures sampled ahead."""
    small = ["group_size=8", "groups_per_iteration=4", "prompts.eval=null"]
    changes = [*small, *settings, f"train.iterations={iterations + 1}", "run.loggers=[]"]
    reward, kinds = Waiting(), {"at once": "rollout.ahead=0", "ahead": "rollout.ahead=1"}
    for kind, ahead in (("", "rollout.ahead=0"), *kinds.items()):
        with TemporaryDirectory() as folder:
            made = Recipe.load(recipe, [*changes, ahead, f"run.dir={folder}/run"])
            run = Trainer(recipe=made, reward_funcs=[reward])
            run.train()
            rows = run.state.log_history[1:]  # the first one warms up
        if not kind:
            rolled = median(row["seconds_rollout"] for row in rows)
            reward.seconds = share * rolled / made.images_per_iteration
            continue
        spent = reward.seconds * made.images_per_iteration
        hidden = median(row.get("seconds_reward_hidden", 0.0) for row in rows) / spent
        each = median(row["seconds_iteration"] for row in rows)
        print(f"{kind}: {each:.2f} s an iteration, {hidden:.0%} of {spent:.2f} s of rewards hidden")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="pocket-geneval")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--train", type=int, default=0, metavar="ITERATIONS")
    parser.add_argument("settings", nargs="*")
    arguments = parser.parse_args()
    if arguments.train:
        train(arguments.recipe, arguments.train, arguments.share, arguments.settings)
        return
    small = ["group_size=8", "groups_per_iteration=4", "rollout.batch=8"]
    both = {
        overlap: Recipe.load(
            arguments.recipe,
            [*small, *arguments.settings, f"rollout.overlap_rewards={str(overlap).lower()}"],
        )
        for overlap in (False, True)
    }
    recipe = both[True]
    assert recipe.overlaps_rewards, "rollout.batch must split the iteration"
    model = PipelineModel(load_pipeline(recipe.model, recipe.precision), call=recipe.rollout.call)
    policy = Policy(model, recipe.lora, recipe.seed)
    prompts = load_prompts(recipe.prompts.train)
    rows = PromptSampler(prompts, recipe.groups_per_iteration, recipe.seed).at(0)
    reward = Waiting()
    rewards = load_rewards([reward])

    def seconds(overlap: bool) -> tuple[float, float]:
        began = time.perf_counter()
        made = Collector(both[overlap], policy, rewards, lambda _: rows)(0)
        hidden = made.figures.get("seconds_reward_hidden", 0.0)
        return time.perf_counter() - began, hidden

    seconds(False)  # embeddings are cached, memory is warm
    reward.seconds = arguments.share * seconds(False)[0] / recipe.images_per_iteration
    found = []
    for _ in range(arguments.rounds):
        apart, _ = seconds(False)
        reward.spent = 0.0
        together, hidden = seconds(True)
        spent = reward.spent
        found.append((together / apart, hidden / spent))
        print(f"apart {apart:.2f} s  overlapped {together:.2f} s  hidden {hidden / spent:.0%}")
    batches = -(-recipe.images_per_iteration // (recipe.rollout.batch or 1))
    ratio, hidden = (median(column) for column in zip(*found, strict=True))
    print(f"median of {len(found)}: {ratio:.3f} of the time, {hidden:.0%} of the rewards hidden")
    print(f"at most {1 - 1 / batches:.0%} with {batches} batches")


if __name__ == "__main__":
    main()
