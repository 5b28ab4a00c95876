"""Learn from pictures that exist already: write ranked groups, then train without a rollout.

    python examples/offline.py --out runs/from-renders

Half of the pictures here are renders of the caption, half of the same shapes in another number.
Yours may come from people, from another model, or from a preference dataset (a pair is a group of
two).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from dgpo import DGPO, Trainer
from dgpo.pocket.scenes import all_metadata, draw_scene, render
from dgpo.preferences import GroupWriter


def write_groups(folder: Path, groups: int, size: int) -> None:
    """Groups of a counting caption: the first half of the pictures as it says, the others not."""
    rng = np.random.default_rng(0)
    captions = all_metadata()["counting"]
    writer = GroupWriter(folder)
    for _ in range(groups):
        asked = captions[rng.integers(len(captions))]
        shape = asked["include"][0]["class"]
        others = [c for c in captions if c["include"][0]["class"] == shape and c != asked]
        right = [asked] * (size // 2)
        wrong = [others[rng.integers(len(others))] for _ in range(size - len(right))]
        pictures = render([draw_scene(row, rng) for row in right + wrong])
        writer.add(
            asked["prompt"],
            [Image.fromarray(picture) for picture in pictures],
            [1.0] * len(right) + [0.0] * len(wrong),
            metadata={key: asked[key] for key in ("tag", "include")},
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--groups", type=int, default=200, help="to write")
    parser.add_argument("--iterations", type=int, default=60, help="of training")
    parser.add_argument("--limit", type=int, default=240, help="held-out prompts to score")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/from-renders"), help="the run folder"
    )
    given = parser.parse_args()
    groups = given.out.with_name(given.out.name + "-groups")
    write_groups(groups, given.groups, size=8)
    trainer = Trainer(
        model="pocket",
        algorithm=DGPO(beta=20, kl=0.02),
        recipe={
            "data": {"preferences": str(groups)},
            "group_size": 8,
            "rollout": {"steps": 10, "guidance_scale": 3, "scheduler": "dpmsolver++"},
            "prompts": {"eval": "pocket-geneval/test"},
            "eval": {"metrics": ["pocket_geneval_strict"], "limit": given.limit},
            "train": {"iterations": given.iterations, "lr": 5e-4},
            "ema": {"decay": 0.9, "every": 1},
            "run": {"dir": str(given.out)},
        },
    )
    report = trainer.train()
    print(report.categories if report else "not evaluated")


if __name__ == "__main__":
    main()
