"""Benchmarks pin prompts, metrics and a sampling protocol together."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Benchmark:
    """A pinned protocol.

    Args:
        name: the benchmark's name.
        prompts: the source of the held-out rows, as :func:`dgpo.prompts.load_prompts` takes it;
            None where dgpo does not ship them and `dgpo eval --prompts` gives their file.
        metrics: the names of rewards, or of metrics of the whole set, such as KID. The first is the
            overall score.
        steps, guidance_scale, scheduler: how the pictures are sampled.
        call: additional keyword arguments of the pipeline's call.
        each: the number of pictures for each prompt, each with its own seed.
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
"""660 held-out scenes in GenEval's six categories, 10 steps of DPM-Solver++, guidance 3."""

POCKET_SD_GENEVAL = replace(
    POCKET_GENEVAL, name="pocket-sd-geneval", scheduler="ddim", guidance_scale=1.0, call={}
)
"""The same scenes for the noise-prediction pocket: 10 DDIM steps, no guidance."""

POCKET_OCR = Benchmark(
    name="pocket-ocr",
    prompts="pocket-ocr/test",
    metrics=("pocket_ocr", "pocket_ocr_exact"),
    call={"max_sequence_length": 1, "height": 16, "width": 48},
)
"""Held-out digit strings on a sign, read by a real OCR engine, 10 Euler steps, no guidance."""

GENEVAL = Benchmark(
    name="geneval",
    prompts=None,
    metrics=("geneval_strict", "geneval"),
    steps=40,
    guidance_scale=4.5,
    call={"height": 512, "width": 512},
    each=4,
)
"""GenEval's 553 prompts (``evaluation_metadata.jsonl`` of github.com/djghosh13/geneval), 4 pictures
each, 40 steps, guidance 4.5, 512 x 512 pixels. arXiv 2505.05470 measures Stable Diffusion 3.5
Medium in this way. The overall score is the mean of the six tags."""
