"""A benchmark pins prompts, metrics and a sampling protocol together."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Benchmark:
    """A ``Benchmark`` is a pinned protocol; its first metric is the overall score.

    Args:
        name: what reports call it.
        prompts: the source of the held-out rows, as :func:`dgpo.prompts.load_prompts` takes it.
            None means a file that dgpo does not ship; `dgpo eval --prompts` names it.
        metrics: the names of rewards, which judge a picture or the whole set (such as KID).
        steps, guidance_scale, scheduler: how the pictures are sampled.
        call: additional keyword arguments for the pipeline's call.
        each: how many pictures are made for each prompt, with different seeds.
    """

    name: str
    prompts: str | None
    metrics: tuple[str, ...]
    steps: int = 10
    guidance_scale: float = 1.0
    scheduler: str | None = None
    call: dict[str, Any] = field(default_factory=dict)
    each: int = 1


POCKET_GENEVAL = Benchmark(
    name="pocket-geneval",
    prompts="pocket-geneval/test",
    metrics=(
        "pocket_geneval_strict",
        "pocket_geneval",
        "pocket_match",
        "pocket_quality",
        "pocket_kid",
    ),
    guidance_scale=3.0,
    scheduler="dpmsolver++",
    call={"max_sequence_length": 1},
)
"""Draws 660 held-out scenes in GenEval's six categories: 10 steps of DPM-Solver++, guidance 3."""

POCKET_SD_GENEVAL = replace(
    POCKET_GENEVAL, name="pocket-sd-geneval", scheduler="ddim", guidance_scale=1.0, call={}
)
"""Draws the same scenes with the noise-prediction pocket: 10 DDIM steps, no guidance."""

POCKET_OCR = Benchmark(
    name="pocket-ocr",
    prompts="pocket-ocr/test",
    metrics=("pocket_ocr", "pocket_ocr_exact"),
    call={"max_sequence_length": 1, "height": 16, "width": 48},
)
"""Draws held-out numbers on a sign, which a real OCR engine reads: 10 Euler steps, no guidance."""

GENEVAL = Benchmark(
    name="geneval",
    prompts=None,
    metrics=("geneval_strict", "geneval"),
    steps=40,
    guidance_scale=4.5,
    call={"height": 512, "width": 512},
    each=4,
)
"""Draws GenEval's 553 prompts (``evaluation_metadata.jsonl`` of github.com/djghosh13/geneval), 4
pictures each, 40 steps, guidance 4.5, 512 x 512 pixels, as arXiv 2505.05470 measures Stable
Diffusion 3.5 Medium. The overall score is the mean of the six tags."""
