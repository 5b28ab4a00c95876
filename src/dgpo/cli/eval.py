"""The command `dgpo eval`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from dgpo import registry
from dgpo.cli.checks import check_file, check_lora
from dgpo.cli.options import Batch, Device, Lora, Model, Precision, VaePrecision
from dgpo.errors import UserError

if TYPE_CHECKING:
    from dgpo.evaluation import Report

_PROMPTS = "If the benchmark has none."
_JSON_FILE = "Write the report to this file."


def evaluate(
    model: Model,
    benchmark: Annotated[str, Option(metavar="B", help="A name of `dgpo list benchmarks`.")],
    lora: Lora = None,
    prompts: Annotated[Path | None, Option(metavar="FILE", help=_PROMPTS)] = None,
    json_file: Annotated[Path | None, Option("--json", metavar="FILE", help=_JSON_FILE)] = None,
    batch: Batch = 128,
    precision: Precision = "float32",
    vae_precision: VaePrecision = None,
    device: Device = None,
) -> None:
    """Score a model on held-out prompts by a pinned protocol."""
    protocol = registry.resolve("benchmark", benchmark)
    if (prompts is None) is (protocol.prompts is None):
        raise UserError(
            f"benchmark {benchmark!r} comes without prompts: give its file by --prompts FILE"
            if prompts is None
            else f"benchmark {benchmark!r} has its own prompts: leave out --prompts"
        )
    check_file("--json", json_file)
    check_lora(lora)
    from dgpo.prompts import load_prompts

    rows = load_prompts(prompts or protocol.prompts)
    rows = [row for row in rows for _ in range(protocol.each)]
    from dgpo.distributed import current_processes
    from dgpo.evaluation import Metrics, Sampling
    from dgpo.evaluation import evaluate as run
    from dgpo.models.load import load_for_sampling
    from dgpo.models.pipeline.adapter import PipelineModel
    from dgpo.models.samplers.schedulers import make_scheduler

    metrics = Metrics(protocol.metrics)
    metrics.check(rows)  # before the pictures are made
    processes = current_processes()
    pipe = load_for_sampling(
        model,
        precision,
        lora=lora,
        device=device or str(processes.device),
        vae_precision=vae_precision,
        say=print if processes.main else lambda _: None,
    )
    scheduler = protocol.scheduler and make_scheduler(protocol.scheduler, pipe.scheduler)
    sampling = Sampling(protocol.steps, protocol.guidance_scale, scheduler, batch)
    policy = PipelineModel(pipe, call=protocol.call)
    report, _ = run(policy, rows, metrics, sampling, protocol.name, processes)
    if not processes.main:
        return
    if json_file is not None:  # before anything is printed, which may fail
        json_file.parent.mkdir(parents=True, exist_ok=True)
        report.write(json_file)
    print(_table(report))
    if json_file is not None:
        print(f"written to {json_file}")


def _table(report: Report) -> str:
    low, high = report.ci95
    lost = f", {report.lost} more are lost" if report.lost else ""
    lines = [
        f"{report.benchmark}: {report.overall:.4f}  "
        f"(95% interval {low:.4f} to {high:.4f}, {report.n} pictures{lost})"
    ]
    rows = [*report.categories.items(), *report.rewards.items()]
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join([*lines, *(f"  {name:<{width}}  {value:.4f}" for name, value in rows)])
