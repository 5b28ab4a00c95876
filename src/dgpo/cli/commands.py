"""The command ``dgpo``. What is heavy to import is imported inside the commands."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from dgpo import registry
from dgpo.cli.collect import collect
from dgpo.cli.common import (
    INTERRUPTED,
    Device,
    Lora,
    Model,
    Precision,
    VaePrecision,
    check_file,
    is_main_process,
    table,
    tell_the_others,
)
from dgpo.cli.compare import compare
from dgpo.cli.detect import detect
from dgpo.cli.list import names
from dgpo.cli.plan import plan
from dgpo.cli.prompts import prompts
from dgpo.cli.rank import rank
from dgpo.cli.sample import sample
from dgpo.cli.score import score
from dgpo.cli.serve import serve
from dgpo.errors import UserError


class _Commands(TyperGroup):
    """Prints what a user did wrong without a traceback; exit codes 2 for it and 130 for Ctrl-C."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            tell_the_others(error)
            typer.echo(str(error), err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            typer.echo("\nstopped", err=True)
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Post-train any diffusion or flow model of diffusers with any reward, by Direct Group "
    "Preference Optimization.\n\nStart with:  dgpo train pocket-geneval train.max_minutes=5",
)
app.command("collect")(collect)
app.command("compare")(compare)
app.command("prompts")(prompts)
app.command("plan")(plan)
app.command("sample")(sample)
app.command("rank")(rank)
app.command("score")(score)
app.command("detect")(detect)
app.command("serve")(serve)
app.command("list")(names)


@app.command()
def train(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE",
            help="A file, a recipe's name, or the run.json of a run folder to repeat that run.",
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings to change, such as train.lr=1e-4."),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the run in run.dir, or in a folder named after."),
    ] = False,
) -> None:
    """Train by a recipe; everything is written to its run folder.

    RUN/run.json repeats a run: its recipe and seed in a new folder beside RUN, with a warning for
    each version that is another one now. On the same machine its numbers are the same.
    """
    from dgpo.recipe import Recipe
    from dgpo.recipe.files import is_manifest, resumed
    from dgpo.run.tracking import refuse_existing_run

    main_process = is_main_process()
    if resume:
        recipe, overrides = resumed(recipe, overrides or [])
    elif is_manifest(recipe):
        overrides = _repeated(Path(recipe), overrides or [])
    settings = Recipe.load(recipe, overrides or [])
    if not resume and main_process:
        refuse_existing_run(settings.run.dir)  # before the seconds that importing torch takes
    from dgpo.models.load import quiet
    from dgpo.trainer import Trainer

    quiet()
    folder = Path(settings.run.dir)
    try:
        Trainer(recipe=settings, resume=resume).train()
    except KeyboardInterrupt:
        if not main_process:
            raise typer.Exit(INTERRUPTED) from None
        if (folder / "recipe.yaml").exists():
            hint = f"go on with: dgpo train {folder / 'recipe.yaml'} --resume"
            typer.echo(f"\nstopped; what was done is in {folder}; {hint}", err=True)
        else:
            typer.echo("\nstopped before the run began", err=True)
        raise typer.Exit(INTERRUPTED) from None
    if main_process:
        typer.echo(f"done: {folder}/README.md says what was measured, {folder}/curve.png shows it")


def _repeated(manifest: Path, overrides: list[str]) -> list[str]:
    """What repeats the run of a manifest beside its recipe; says what is not as it was then."""
    from dgpo.distributed import current_processes
    from dgpo.run.manifest import differences, read_starts
    from dgpo.run.repeat import free_folder

    processes = current_processes()
    starts = read_starts(manifest)
    folder = processes.broadcast_object(
        lambda: str(free_folder(manifest)), "the folder of the new run"
    )
    if processes.main:
        for difference in differences(starts):
            typer.echo(f"warning: {difference}", err=True)
    return [f"run.dir={json.dumps(folder, ensure_ascii=False)}", *overrides]


@app.command("eval")
def evaluate(
    model: Model,
    benchmark: Annotated[
        str, typer.Option("--benchmark", metavar="B", help="A name of `dgpo list benchmarks`.")
    ],
    lora: Lora = None,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", metavar="FILE", help="For a benchmark whose file you bring."),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the report there.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Pictures made at once.")] = 128,
    precision: Precision = "float32",
    vae_precision: VaePrecision = None,
    device: Device = None,
) -> None:
    """Score a model on held-out prompts by a pinned protocol."""
    protocol = registry.resolve("benchmark", benchmark)
    check_file("--json", json_file)
    from dgpo.distributed import current_processes
    from dgpo.evaluation import Metrics, Sampling
    from dgpo.evaluation import evaluate as run
    from dgpo.models.pipeline.adapter import PipelineModel
    from dgpo.models.samplers.schedulers import make_scheduler
    from dgpo.prompts import load_prompts

    if (prompts is None) is (protocol.prompts is None):
        raise UserError(
            f"benchmark {benchmark!r} comes without prompts: give its file by --prompts FILE"
            if prompts is None
            else f"benchmark {benchmark!r} has its own prompts: leave --prompts away"
        )
    rows = load_prompts(prompts or protocol.prompts)
    rows = [row for row in rows for _ in range(protocol.each)]
    metrics = Metrics(protocol.metrics)
    metrics.check(rows)  # before the pictures are made
    from dgpo.models.load import load_for_sampling

    processes = current_processes()
    pipe = load_for_sampling(
        model,
        precision,
        lora=lora,
        device=device or str(processes.device),
        vae_precision=vae_precision,
    )
    scheduler = protocol.scheduler and make_scheduler(protocol.scheduler, pipe.scheduler)
    sampling = Sampling(protocol.steps, protocol.guidance_scale, scheduler, batch)
    policy = PipelineModel(pipe, call=protocol.call)
    report, _ = run(policy, rows, metrics, sampling, protocol.name, processes)
    if not processes.main:
        return
    typer.echo(table(report))
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        report.write(json_file)
        typer.echo(f"written to {json_file}")


@app.command()
def check(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="pocket, a hub id, or a pipeline's folder.")
    ],
    call: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", help="Arguments of the pipeline's call, such as height=512."
        ),
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option("--image", metavar="FILE", help="For a pipeline that starts from a picture."),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option("--mask", metavar="FILE", help="For a pipeline that paints in a mask."),
    ] = None,
    precision: Precision = "float32",
    vae_precision: VaePrecision = None,
    device: Device = None,
) -> None:
    """Prove that a model can be trained, by training it for a moment.

    Its rollouts are repeated point by point, bit for bit; a LoRA is trained, saved and read back.
    """
    from dgpo.recipe.files import apply_overrides

    arguments = apply_overrides({}, call or [])
    from dgpo.prompts import load_prompts
    from dgpo.prompts.caption import pictures_of

    given = {"image": image, "mask": mask}
    files = {name: str(file) for name, file in given.items() if file is not None}
    pictures = pictures_of(load_prompts([{"prompt": "a picture", **files}])[0].text)
    from dgpo.check.compatibility import examine
    from dgpo.models.load import load_for_sampling
    from dgpo.models.pipeline.adapter import PipelineModel

    found = examine(
        lambda: load_for_sampling(model, precision, device=device, vae_precision=vae_precision),
        lambda pipe: PipelineModel(pipe, call=arguments),
        pictures.get("image"),
        pictures.get("mask"),
    )
    if not found.ok:
        raise UserError(str(found))
    typer.echo(str(found))


def main() -> None:
    """Entry point of the console script."""
    # `my_rewards:score` in the folder one stands in is found, as with `python -m`; last in the
    # path, so that nothing installed is hidden by it
    sys.path.append(os.getcwd())
    # transformers warns of image processors without torchvision as soon as it is imported
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    app()
