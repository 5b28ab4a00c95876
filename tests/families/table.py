"""Writes docs/models.md: the questions of ``dgpo check``, asked of every tiny pipeline.

PYTHONPATH=src:tests python -m families.table docs/models.md
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

from dgpo.check.compatibility import QUESTIONS, Answer, Examination, examine
from dgpo.models.pipeline.families import FAMILIES
from families.tiny import TINY, build, tiny_model
from tools.docs_tables import models

COMMAND = "PYTHONPATH=src:tests .venv/bin/python -m families.table docs/models.md"
_ABOUT = """# Models

The pipeline is the denoiser: `dgpo` calls diffusers' own pipelines, for sampling and for training,
so a model needs no code here. This table is the proof. A tiny pipeline of each family, of random
weights and with the family's own architecture, sampler, text encoding and guidance, was asked seven
questions; each answer comes from doing it.

{questions}

Answers: **yes**; **none**, the pipeline has no such thing; **refused**, `dgpo` says with a message
that it will not. An answer of **no**, where something differs, fails the tests. What tiny pipelines
cannot show: half precision, GPU kernels, memory, whether training a large model pays. `dgpo check`
asks the same of a real model, which it loads twice:

    dgpo check stabilityai/stable-diffusion-3.5-medium height=512 width=512

No layer has to be named. `lora.targets: auto`, the default, adapts the eight joint-attention
projections of Stable Diffusion 3 where the denoiser has them all (Flux, Qwen-Image and others have
them too), else the attention's `to_q`, `to_k`, `to_v` and `to_out.0`. A run says in one line which
layers it found, and `dgpo check` names them. A list in the recipe is taken as it is.

These small models are inside the package (`model: pocket`), to try things with:

<!-- table: models -->
{built_in}
<!-- end -->

The pipelines that were asked:

| pipeline | learns | {titles} |
|---|---|{lines}|
{rows}

Refused as a whole:

{refused}
- every pipeline that steps a second scheduler, of a sound for example, beside its own (LTX-2)

This page is written by

    {command}

and a test compares it with what it measures.
"""


@functools.cache
def examined(name: str) -> Examination:
    """The answers about one family."""
    make, wrap = functools.partial(build, name), functools.partial(tiny_model, name)
    tiny = TINY[name]
    return examine(make, wrap, tiny.picture and tiny.picture(), tiny.mask and tiny.mask())


def row(name: str) -> str:
    """The line of the page about one family."""
    found = examined(name)
    if TINY[name].refused is not None:
        return f"- {found.pipeline}: {found.answers['no guidance'].note}"
    cells = [_cell(found.answers[question]) for question in QUESTIONS]
    return f"| {title(name)} | {found.process} | {' | '.join(cells)} |"


def title(name: str) -> str:
    """The class of the pipeline, and which of two models of one class it is."""
    variant = {"wan": " (2.1)", "wan22": " (2.2, two experts)"}.get(name, "")
    return examined(name).pipeline + variant


def _cell(answer: Answer) -> str:
    return answer.cell.replace("|", "\\|")


def page() -> str:
    """All of docs/models.md."""
    refused = [name for name in TINY if TINY[name].refused is not None]
    others = [f"- {name}: {f.refusal}" for name, f in FAMILIES.items() if f.refusal is not None]
    listed = "\n".join([*map(row, refused), *others])
    return _ABOUT.format(
        questions="\n".join(f"- **{q}**: {meaning}." for q, meaning in QUESTIONS.items()),
        titles=" | ".join(QUESTIONS),
        lines="|".join("---" for _ in QUESTIONS),
        rows="\n".join(row(name) for name in TINY if name not in refused),
        refused=listed,
        command=COMMAND,
        built_in=models(),
    )


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
