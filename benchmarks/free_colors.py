"""Which colours are drawn where the caption leaves the colour free: what the base does, and LoRAs.

    python benchmarks/free_colors.py [LORA ...]

A policy that paints everything in the colour that is read best scores well and has lost variety.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import numpy as np

from dgpo.evaluation import Sampling, sample_images
from dgpo.evaluation.benchmarks import POCKET_GENEVAL
from dgpo.models.pipeline.adapter import PipelineModel
from dgpo.models.samplers.schedulers import make_scheduler
from dgpo.models.weights.lora_files import load as load_lora
from dgpo.pocket import load_pocket
from dgpo.pocket.scenes import COLORS
from dgpo.pocket.verifier import find_objects
from dgpo.prompts import load_prompts

CATEGORIES = ("single_object", "two_object", "counting", "position")


def shares(lora: Path | None) -> dict[str, float]:
    """The share of each colour among the objects of the benchmark's rows that name none."""
    pipe = load_pocket()
    if lora is not None:
        load_lora(pipe, lora)
    rows = load_prompts(POCKET_GENEVAL.prompts or "")
    rows = [row for row in rows if row.metadata["tag"] in CATEGORIES]
    scheduler = make_scheduler(POCKET_GENEVAL.scheduler, pipe.scheduler)
    how = Sampling(POCKET_GENEVAL.steps, POCKET_GENEVAL.guidance_scale, scheduler, 220)
    images = sample_images(PipelineModel(pipe, call=POCKET_GENEVAL.call), rows, how)
    found = Counter(thing.color for image in images for thing in find_objects(np.asarray(image)))
    return {color: found[color] / found.total() for color in COLORS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("loras", nargs="*", type=Path, metavar="LORA")
    print(f"| | {' | '.join(COLORS)} |\n|---|{'---|' * len(COLORS)}")
    for lora in [None, *parser.parse_args().loras]:
        cells = " | ".join(f"{share:.3f}" for share in shares(lora).values())
        print(f"| {lora or 'base'} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
