"""The command ``python -m tools.pretrain``: from nothing to the weights of the package."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from safetensors.torch import save_file

from dgpo.pocket.text import build_tokenizer
from tools.pretrain.autoencoder import encode, reconstruct, train_vae
from tools.pretrain.build import assemble, build_transformer
from tools.pretrain.captions import CaptionTable, train_text_encoders
from tools.pretrain.common import Training
from tools.pretrain.pipelines import check_pipeline, save_pipeline
from tools.pretrain.skills import Examples, Skill, scene_skill
from tools.pretrain.transformer import FlowData, FlowSettings, train_flow

VAE_EXAMPLES = 40_000
FLOW_EXAMPLES = 80_000


def pretrain(
    skill: Annotated[
        Literal["scenes", "signs"], typer.Option(help="What the model learns to draw.")
    ] = "scenes",
    out: Annotated[
        Path, typer.Option(help="The folder; a run that was stopped in it goes on.")
    ] = Path("runs/pretrain"),
    stage: Annotated[
        Literal["base", "control", "measures", "sd"],
        typer.Option(
            help="The last stage: wrong captions (base) or clean ones (control). measures trains "
            "the networks of the measures, and sd a model that predicts noise."
        ),
    ] = "base",
    clean_steps: Annotated[
        int, typer.Option(help="Steps on clean captions, which base and control share.")
    ] = 12000,
    final_steps: Annotated[int, typer.Option(help="Steps of the last stage, with decay.")] = 3500,
    batch: Annotated[int, typer.Option(help="Pictures in a step of the transformer.")] = 128,
    seed: Annotated[int, typer.Option(help="The seed of weights, data and noise.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
) -> None:
    """Train a pocket model and write its pipeline.

    The autoencoder, the text encoders and the transformer are trained one after the other. The
    transformer first learns on clean captions. From there two models part: the base goes on with
    captions of which a known share is wrong, the control with clean ones. The stage sd teaches a
    UNet that predicts noise what the package's own pocket of this skill does.
    """
    torch.set_num_threads(threads)
    task = _skill(skill)
    if stage == "sd":
        from tools.pretrain.cli_sd import pretrain_sd

        pretrain_sd(task, out, seed)
        return
    first = task.draw(VAE_EXAMPLES, seed + 1)
    if stage == "measures":
        _measures(out, first.images, seed)
        return
    pipe = _without_transformer(task, first, out, seed)
    contents, data = _flow_data(task, first, task.draw(FLOW_EXAMPLES, seed + 2), pipe.vae)
    embed = CaptionTable(pipe.tokenizer, (pipe.text_encoder, pipe.text_encoder_2))

    def run(name: str, data: FlowData, settings: FlowSettings) -> None:
        def evaluate() -> dict[str, float]:
            return check_pipeline(pipe, task, out / f"{name}.png")

        train_flow(out / name, pipe.transformer, embed, data, settings, evaluate)

    run("clean", data, FlowSettings(steps=clean_steps, batch=batch, hold=1.0, seed=seed + 1))
    if stage == "base":
        data = replace(data, captions=_wrong_captions(task, contents))
    if task.weight:
        data = replace(data, weights=torch.tensor([task.weight(one) for one in contents]))
    run(stage, data, FlowSettings(steps=final_steps, batch=batch, hold=0.0, seed=seed + 2))
    save_pipeline(pipe, out / "pipeline" / stage)
    print(json.dumps(check_pipeline(pipe, task, out / f"{stage}.png"), indent=2))


def _skill(name: str) -> Skill:
    if name == "scenes":
        return scene_skill()
    from tools.pretrain.sign_skill import sign_skill

    return sign_skill()


def _without_transformer(task: Skill, examples: Examples, out: Path, seed: int) -> Any:
    """Make the pipeline with a trained autoencoder, trained text encoders and a new transformer."""
    vae = _autoencoder(task, examples, out, seed)
    tokenizer = build_tokenizer()
    training = Training(steps=600, batch=128, lr=2e-3, seed=seed)
    encoders = train_text_encoders(
        out / "text", tokenizer, task.captions, task.labels, task.word_labels, training
    )
    torch.manual_seed(seed)
    transformer = build_transformer(task.height // 4, task.width // 4)
    return assemble(tokenizer, encoders, transformer, vae, task.shift)


def _autoencoder(task: Skill, examples: Examples, out: Path, seed: int) -> Any:
    def score(images: np.ndarray) -> float:
        return float(np.mean(task.right(images, examples.contents[: len(images)])))

    training = Training(steps=3000, batch=32, lr=3e-3, seed=seed)
    vae = train_vae(out / "vae", examples.images, score, training)
    right = score(reconstruct(vae, examples.images[:600]))
    print(f"autoencoder: {right:.4f} right on reconstructions")
    return vae


def _flow_data(
    task: Skill, first: Examples, second: Examples, vae: Any
) -> tuple[list[Any], FlowData]:
    """Encode all examples, with their true captions; returns their contents too."""
    contents = [*first.contents, *second.contents]
    raw = torch.cat([encode(vae, first.images), encode(vae, second.images)])
    latents = (raw - vae.config["shift_factor"]) * vae.config["scaling_factor"]
    layouts = [part.layout for part in (first, second) if part.layout is not None]

    def true_captions(rows: list[int], _: torch.Generator) -> list[str]:
        return [task.caption(contents[row]) for row in rows]

    return contents, FlowData(latents, true_captions, torch.cat(layouts) if layouts else None)


def _wrong_captions(task: Skill, contents: list[Any]) -> Any:
    def wrong_captions(rows: list[int], generator: torch.Generator) -> list[str]:
        rng = np.random.default_rng(int(torch.randint(2**31, (1,), generator=generator)))
        return [task.wrong(contents[row], rng) for row in rows]

    return wrong_captions


def _measures(out: Path, images: np.ndarray, seed: int) -> None:
    from tools.pretrain.data import draw_scenes
    from tools.pretrain.measures import train_measures

    training = Training(steps=3000, batch=96, lr=2e-3, seed=seed)
    scenes = draw_scenes(VAE_EXAMPLES, seed + 1)
    measures = train_measures(out / "measures", images, scenes, training)
    save_file(measures.state_dict(), out / "measures.safetensors")
