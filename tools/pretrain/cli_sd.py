"""The stage sd: the pocket teaches the noise-prediction pocket."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from dgpo.errors import UserError
from dgpo.pocket import load_pocket
from tools.pretrain.autoencoder import encode
from tools.pretrain.build_sd import assemble_sd, build_unet, reading_encoder
from tools.pretrain.captions import CaptionTable
from tools.pretrain.pipelines import check_pipeline, save_pipeline
from tools.pretrain.skills import Skill
from tools.pretrain.unet import Lessons, LessonSettings, Teacher, encode_last, train_unet

EXAMPLES = 20_000
GUIDANCE = 3.0
"""The teacher's guidance scale: that of the benchmark, so that the UNet needs none."""


def pretrain_sd(task: Skill, out: Path, seed: int) -> None:
    """Train the UNet beside the other parts of the shipped pocket, and write its pipeline.

    Args:
        task: the skill of scenes.
        out: the folder of the stage and of the pipeline.
        seed: the seed of weights, data and noise.

    Raises:
        UserError: the skill has no layout that could be taught.
    """
    if task.name != "scenes":
        raise UserError(f"--stage sd: there is no layout of {task.name} to teach; give scenes")
    examples = task.draw(EXAMPLES, seed + 3)
    assert examples.layout is not None
    pocket: Any = load_pocket(task.name)
    teacher = Teacher(pocket, GUIDANCE)
    latents = encode(pocket.vae, examples.images) * pocket.vae.config["scaling_factor"]
    captions = [task.caption(content) for content in examples.contents]
    torch.manual_seed(seed)
    unet = build_unet(task.height // 4, task.width // 4)
    reader = reading_encoder(pocket.text_encoder)
    pipe = assemble_sd(pocket.tokenizer, reader, unet, pocket.vae)
    embed = CaptionTable(pocket.tokenizer, (reader,), encode_last)

    def evaluate() -> dict[str, float]:
        return check_pipeline(pipe, task, out / "sd.png", (1.0,), {})

    data = Lessons(latents, captions, examples.layout)
    train_unet(out / "sd", unet, embed, teacher, data, LessonSettings(seed=seed), evaluate)
    save_sd(pipe, out / "pipeline" / "sd")
    print(json.dumps(evaluate(), indent=2))


def save_sd(pipe: StableDiffusionPipeline, folder: Path) -> None:
    """Write a pipeline folder as every version of transformers reads it.

    The paths that its parts came from are left out, and the text encoder's weights have the names
    of Stable Diffusion 1.5's own.
    """
    save_pipeline(pipe, folder)
    config = folder / "vae" / "config.json"
    settings = json.loads(config.read_text())
    settings.pop("_name_or_path", None)
    config.write_text(json.dumps(settings, indent=2) + "\n")
    file = folder / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    named = {f"text_model.{key.removeprefix('text_model.')}": w for key, w in weights.items()}
    save_file(named, file, metadata={"format": "pt"})
