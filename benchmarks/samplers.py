"""Which sampler loses least in ten steps?  The score of pocket-geneval by sampler, shift and steps.

python benchmarks/samplers.py pocket euler,3,10 dpmsolver++,1.5,10
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from diffusers import FlowMatchEulerDiscreteScheduler

from dgpo.evaluation import Metrics, Sampling, evaluate
from dgpo.evaluation.benchmarks import POCKET_GENEVAL
from dgpo.models.load import load_pipeline
from dgpo.models.pipeline.adapter import PipelineModel
from dgpo.models.samplers.schedulers import make_scheduler
from dgpo.prompts import load_prompts


@dataclass(frozen=True)
class Choice:
    """A sampler by name, the shift of its schedule, its steps, and the scale of guidance."""

    sampler: str
    shift: float
    steps: int
    guidance: float = POCKET_GENEVAL.guidance_scale

    @classmethod
    def read(cls, text: str) -> Choice:
        """From ``SAMPLER,SHIFT,STEPS`` or ``SAMPLER,SHIFT,STEPS,GUIDANCE``."""
        sampler, shift, steps, *guidance = text.split(",")
        return cls(sampler, float(shift), int(steps), *map(float, guidance))

    def sampling(self) -> Sampling:
        base = FlowMatchEulerDiscreteScheduler(shift=self.shift)
        return Sampling(self.steps, self.guidance, make_scheduler(self.sampler, base), 256)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="pocket, or the folder of a pipeline")
    parser.add_argument(
        "choices", nargs="+", type=Choice.read, metavar="SAMPLER,SHIFT,STEPS[,GUIDANCE]"
    )
    given = parser.parse_args()
    policy = PipelineModel(load_pipeline(given.model), call=POCKET_GENEVAL.call)
    rows, metrics = load_prompts(POCKET_GENEVAL.prompts), Metrics([POCKET_GENEVAL.metrics[0]])
    print("| sampler | shift | steps | guidance | strict | categories |\n|---|---|---|---|---|---|")
    for choice in given.choices:
        report, _ = evaluate(policy, rows, metrics, choice.sampling(), POCKET_GENEVAL.name)
        parts = " ".join(f"{value:.2f}" for value in report.categories.values())
        print(
            f"| {choice.sampler} | {choice.shift:g} | {choice.steps} | {choice.guidance:g} "
            f"| {report.overall:.3f} | {parts} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
