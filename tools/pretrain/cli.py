"""``python -m tools.pretrain``: from nothing to the weights of the package."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from safetensors.torch import save_file

from dgpo.errors import UserError
from dgpo.pocket.text import build_tokenizer
from tools.pretrain.autoencoder import encode, reconstruct, train_vae
from tools.pretrain.build import assemble, build_transformer
from tools.pretrain.captions import CaptionTable, train_text_encoders
from tools.pretrain.skills import Skill, scene_skill
from tools.pretrain.transformer import FlowData, FlowSettings, train_flow

VAE_EXAMPLES = 40_000
FLOW_EXAMPLES = 80_000


def pretrain(
    skill: Annotated[str, typer.Option(help="scenes or signs")] = "scenes",
    out: Annotated[Path, typer.Option(help="folder; a stopped run in it goes on")] = Path(
        "runs/pretrain"
    ),
    stage: Annotated[
        str, typer.Option(help="base (wrong captions), control (clean ones), measures or sd")
    ] = "base",
    clean_steps: Annotated[int, typer.Option(help="steps on clean captions, shared")] = 12000,
    final_steps: Annotated[int, typer.Option(help="steps after that, with decay")] = 3500,
    batch: Annotated[int, typer.Option(help="pictures a step")] = 128,
    seed: Annotated[int, typer.Option(help="of weights, data and noise")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads")] = 2,
) -> None:
    """Train a pocket model: autoencoder, text encoders, transformer; then write its pipeline.

    The transformer first learns on clean captions.  From there two models part: the base goes on
    with captions of which a known share is wrong, the control with clean ones.  The stage sd
    teaches a UNet that predicts noise what the package's own pocket of this skill does.
    """
    torch.set_num_threads(threads)
    task = _skill(skill)
    if stage == "sd":
        from tools.pretrain.cli_sd import pretrain_sd  # it needs this module

        pretrain_sd(task, out, seed)
        return
    first = task.draw(VAE_EXAMPLES, seed + 1)
    if stage == "measures":
        _measures(out, first.images, seed)
        return
    if stage not in ("base", "control"):
        raise UserError(f"--stage {stage!r}: give base, control, measures or sd")

    def score(images: np.ndarray) -> float:
        return float(np.mean(task.right(images, first.contents[: len(images)])))

    vae = train_vae(out / "vae", first.images, score, seed=seed)
    print(
        f"autoencoder: {score(reconstruct(vae, first.images[:600])):.4f} right on reconstructions"
    )
    tokenizer = build_tokenizer()
    encoders = train_text_encoders(
        out / "text", tokenizer, task.captions, task.labels, task.word_labels, seed=seed
    )
    second = task.draw(FLOW_EXAMPLES, seed + 2)
    contents = [*first.contents, *second.contents]
    raw = torch.cat([encode(vae, first.images), encode(vae, second.images)])
    scale: Any = vae.config
    latents = (raw - scale["shift_factor"]) * scale["scaling_factor"]
    layouts = [part.layout for part in (first, second) if part.layout is not None]
    layout = torch.cat(layouts) if layouts else None
    embed = CaptionTable(tokenizer, encoders)
    torch.manual_seed(seed)
    transformer = build_transformer(task.height // 4, task.width // 4)
    pipe = assemble(tokenizer, encoders, transformer, vae, task.shift)

    def true_captions(rows: list[int], _: torch.Generator) -> list[str]:
        return [task.caption(contents[row]) for row in rows]

    def wrong_captions(rows: list[int], generator: torch.Generator) -> list[str]:
        rng = np.random.default_rng(int(torch.randint(2**31, (1,), generator=generator)))
        return [task.wrong(contents[row], rng) for row in rows]

    def run(name: str, captions, settings: FlowSettings, offset: int, weights=None) -> None:
        def evaluate() -> dict[str, float]:
            return check_pipeline(pipe, task, out / f"{name}.png")

        data = FlowData(latents, captions, layout, weights)
        train_flow(out / name, transformer, embed, data, settings, evaluate, seed + offset)

    run("clean", true_captions, FlowSettings(steps=clean_steps, batch=batch, hold=1.0), 1)
    captions = wrong_captions if stage == "base" else true_captions
    weights = task.weight and torch.tensor([task.weight(content) for content in contents])
    run(stage, captions, FlowSettings(steps=final_steps, batch=batch, hold=0.0), 2, weights)
    save_pipeline(pipe, out / "pipeline" / stage)
    print(json.dumps(check_pipeline(pipe, task, out / f"{stage}.png"), indent=2))


def _skill(name: str) -> Skill:
    if name == "scenes":
        return scene_skill()
    if name == "signs":
        from tools.pretrain.sign_skill import sign_skill

        return sign_skill()
    raise UserError(f"--skill {name!r}: give scenes or signs")


def check_pipeline(
    pipe: Any,
    skill: Skill,
    grid: Path,
    guidances: tuple[float, ...] = (1.0, 3.0),
    call: dict[str, Any] | None = None,
) -> dict[str, float]:
    """Exact success by category without guidance, and overall with 3.0; draws a grid of samples.

    ``call`` holds further arguments of the pipeline; None: one token for the silent encoder.
    """
    figures: dict[str, float] = {}
    rows = skill.held_out
    for guidance in guidances:
        made = pipe(
            [row["prompt"] for row in rows],
            num_inference_steps=10,
            guidance_scale=guidance,
            height=skill.height,
            width=skill.width,
            generator=torch.Generator().manual_seed(3),
            output_type="np",
            **({"max_sequence_length": 1} if call is None else call),
        ).images
        images = (np.asarray(made) * 255).round().astype(np.uint8)
        right = skill.right(images, rows)
        tags = [row.get("tag", "all") for row in rows]
        by_tag = {
            tag: float(np.mean([r for r, t in zip(right, tags, strict=True) if t == tag]))
            for tag in dict.fromkeys(tags)
        }
        name = f"cfg{guidance:g}"
        figures[name] = float(np.mean(list(by_tag.values())))
        figures[f"{name}_known"] = skill.known(images)
        if guidance == 1.0:
            figures |= by_tag
            _draw(images, grid)
    return figures


def _draw(images: np.ndarray, file: Path, columns: int = 20, scale: int = 3) -> None:
    height, width = images.shape[1:3]
    chosen = images[: len(images) // columns * columns]
    table = chosen.reshape(-1, columns, height, width, 3).transpose(0, 2, 1, 3, 4)
    sheet = Image.fromarray(table.reshape(-1, columns * width, 3))
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST).save(file)


def save_pipeline(pipe: Any, folder: Path) -> None:
    """Write a pipeline folder that the stock ``from_pretrained`` loads."""
    shutil.rmtree(folder, ignore_errors=True)
    vae: Any = pipe.vae
    vae.to(memory_format=torch.contiguous_format)
    pipe.save_pretrained(folder)


def _measures(out: Path, images: np.ndarray, seed: int) -> None:
    from tools.pretrain.data import draw_scenes
    from tools.pretrain.measures import train_measures

    measures = train_measures(
        out / "measures", images, draw_scenes(VAE_EXAMPLES, seed + 1), steps=3000, seed=seed
    )
    save_file(measures.state_dict(), out / "measures.safetensors")
