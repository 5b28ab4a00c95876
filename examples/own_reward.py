"""A reward of your own, a pipeline of your own: five lines that make the pocket model draw in red.

    python examples/own_reward.py --minutes 3 --out runs/red

Any diffusers pipeline may stand where ``load_pocket()`` does, any function where ``redness`` does.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from dgpo import DGPO, Trainer, load_pocket


def redness(images: Sequence[Image.Image], prompts: Sequence[str], **_: Any) -> list[float]:
    """How much redder than green or blue a picture is, from -1 to 1."""
    pixels = (np.asarray(image.convert("RGB"), dtype=float) / 255 for image in images)
    return [float((p[..., 0] - p[..., 1:].mean(-1)).mean()) for p in pixels]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=3, help="of training")
    parser.add_argument("--iterations", type=int, default=100, help="at most")
    parser.add_argument("--groups", type=int, default=8, help="prompts of an iteration")
    parser.add_argument("--out", default="runs/red", help="the run folder")
    given = parser.parse_args()
    trainer = Trainer(
        model=load_pocket(),
        reward_funcs=[redness],
        train_dataset=["a photo of a circle", "a photo of two squares", "a photo of a star"],
        eval_dataset=["a photo of a triangle", "a photo of two crosses"],
        algorithm=DGPO(beta=20, kl=0.02),
        recipe={
            "groups_per_iteration": given.groups,
            "rollout": {"steps": 10, "guidance_scale": 3, "scheduler": "dpmsolver++"},
            "train": {
                "iterations": given.iterations,
                "max_minutes": given.minutes,
                "lr": 1e-3,
            },
            "ema": {"decay": 0.9, "every": 1},
            "run": {"dir": given.out},
        },
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    print(f"redness {before.overall:.3f} -> {after.overall:.3f}; pictures in {given.out}/samples")


if __name__ == "__main__":
    main()
