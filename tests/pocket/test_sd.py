"""The noise-prediction pocket: its parts, its teacher, and how it is taught."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, PNDMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file

from dgpo import Recipe, Trainer
from dgpo.errors import UserError
from dgpo.evaluation.benchmarks import POCKET_SD_GENEVAL
from dgpo.models.samplers.schedulers import make_scheduler
from dgpo.pocket import WEIGHTS, load_pocket, load_pocket_sd
from dgpo.pocket.prompts import test_prompts as held_out_rows
from dgpo.pocket.text import build_text_encoder, build_tokenizer
from dgpo.pocket.verifier import find_objects
from families.tiny import build
from tools.pretrain import unet as lessons
from tools.pretrain.build import build_vae
from tools.pretrain.build_sd import assemble_sd, build_unet, noise_schedule, reading_encoder
from tools.pretrain.captions import CaptionTable, tokenize
from tools.pretrain.cli_sd import pretrain_sd, save_sd
from tools.pretrain.sign_skill import sign_skill
from tools.pretrain.skills import scene_skill

CAPTIONS = ["a photo of a circle", "a photo of a red cross and a blue square"]
PROMPTS = ["a photo of cat", "red dog", "blue house"]
ALPHAS = noise_schedule().alphas_cumprod


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    return tokenizer, reading_encoder(build_text_encoder(tokenizer))


def test_the_text_is_read_as_the_other_pocket_reads_it():
    tokenizer = build_tokenizer()
    theirs = build_text_encoder(tokenizer)
    ids = tokenize(tokenizer, CAPTIONS)
    with torch.no_grad():
        read = theirs(ids, output_hidden_states=True).hidden_states[-2]
        ours, _ = lessons.encode_last((reading_encoder(theirs),), ids)
    torch.testing.assert_close(ours, torch.nn.functional.layer_norm(read, read.shape[-1:]))


def test_training_and_the_pipeline_read_captions_alike(parts):
    tokenizer, reader = parts
    pipe = assemble_sd(tokenizer, reader, build_unet(8, 8, (16, 32)), build_vae())
    known, _ = pipe.encode_prompt(CAPTIONS, "cpu", 1, False)
    assert torch.equal(known, CaptionTable(tokenizer, (reader,), lessons.encode_last)(CAPTIONS)[0])


def test_stock_diffusers_saves_and_loads_it(parts, tmp_path):
    tokenizer, reader = parts
    pipe = assemble_sd(tokenizer, reader, build_unet(8, 8, (16, 32)), load_pocket().vae)
    save_sd(pipe, tmp_path)
    assert str(WEIGHTS) not in (tmp_path / "vae" / "config.json").read_text()
    names = load_file(tmp_path / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in names)
    again = StableDiffusionPipeline.from_pretrained(tmp_path)

    def draw(pipe):
        generator = torch.Generator().manual_seed(0)
        return pipe(CAPTIONS[0], num_inference_steps=3, generator=generator).images[0]

    assert draw(pipe).size == (32, 32)
    assert draw(again).tobytes() == draw(pipe).tobytes()


def test_the_unet_has_the_size_that_is_said():
    assert sum(p.numel() for p in build_unet(8, 8).parameters()) == pytest.approx(2.0e6, rel=0.02)


class Velocity(torch.nn.Module):
    """Answers the true velocity of one clean sample; with an empty caption, another's."""

    def __init__(self, clean, without):
        super().__init__()
        self.clean, self.without, self.asked = clean, without, []

    def forward(self, hidden_states, timestep, **_):
        s = (timestep / 1000).view(-1, 1, 1, 1)
        self.asked.append(timestep)
        both = torch.cat([self.clean, self.without])
        return ((hidden_states - (1 - s) * both) / s - both,)


def teacher(shift=0.0, guidance=1.0):
    generator = torch.Generator().manual_seed(1)
    clean, without, noise = torch.randn(3, 2, 4, 8, 8, generator=generator)
    pipe = load_pocket()
    pipe.vae.register_to_config(shift_factor=shift / pipe.vae.config["scaling_factor"])
    pipe.transformer = Velocity(clean, without)
    return lessons.Teacher(pipe, guidance), clean, without, noise


@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_the_teacher_sees_the_noise_that_was_added(shift):
    asked, clean, _, noise = teacher(shift)
    a = ALPHAS[torch.tensor([150, 950])]
    part = a.view(-1, 1, 1, 1)
    xt = part.sqrt() * (clean + shift) + (1 - part).sqrt() * noise
    torch.testing.assert_close(asked.noise(xt, a, CAPTIONS), noise, rtol=1e-3, atol=1e-3)
    s = math.sqrt(1 - a[0]) / (math.sqrt(1 - a[0]) + math.sqrt(a[0]))
    assert asked.transformer.asked[0][0] == pytest.approx(1000 * s)


def test_the_teachers_guidance_is_that_of_the_pipeline():
    """In the noise as in the velocity: guidance is linear, and so is the way between the two."""
    a = ALPHAS[torch.tensor([500, 500])]
    part = a.view(-1, 1, 1, 1)

    def noise(guidance):
        asked, clean, _, noise = teacher(guidance=guidance)
        return asked.noise(part.sqrt() * clean + (1 - part).sqrt() * noise, a, CAPTIONS)

    none, one, three = noise(0.0), noise(1.0), noise(3.0)
    torch.testing.assert_close(three, none + 3 * (one - none), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(none, one, atol=0.1)


def test_an_error_of_noise_counts_as_one_of_the_velocity_up_to_a_bound():
    weights = lessons.level_weights(ALPHAS)
    assert weights[0] == pytest.approx(1 / ALPHAS[0])
    assert weights[500] == pytest.approx(1 / ALPHAS[500])
    assert weights[-1] == lessons.HEAVIEST < 1 / ALPHAS[-1]


def test_the_shipped_base_is_right_as_often_as_it_should_be():
    """On 240 of the held-out rows, as the benchmark samples them, loaded by diffusers alone."""
    pipe = DiffusionPipeline.from_pretrained(WEIGHTS / "scenes-sd")
    assert isinstance(pipe, StableDiffusionPipeline)
    assert isinstance(pipe.scheduler, PNDMScheduler)
    pipe.scheduler = make_scheduler(POCKET_SD_GENEVAL.scheduler, pipe.scheduler)
    pipe.set_progress_bar_config(disable=True)
    rows = held_out_rows()[:240]
    made: Any = pipe(
        [row["prompt"] for row in rows],
        num_inference_steps=POCKET_SD_GENEVAL.steps,
        guidance_scale=POCKET_SD_GENEVAL.guidance_scale,
        generator=[torch.Generator().manual_seed(row["seed"]) for row in rows],
        **POCKET_SD_GENEVAL.call,
    )
    images = np.stack([np.asarray(image) for image in made.images])
    skill = scene_skill()
    assert 0.50 <= np.mean(skill.right(images, rows)) <= 0.72
    assert skill.known(images) >= 0.85


def test_the_pipelines_defaults_draw_what_is_asked():
    """50 steps of PLMS, guidance 7.5."""
    pipe = load_pocket_sd()
    captions = ["a photo of a red circle", "a photo of a blue cross", "a photo of a green square"]
    made: Any = pipe(captions * 4, generator=torch.Generator().manual_seed(0))
    found = [find_objects(np.asarray(image)) for image in made.images]
    known = [f.shape != "unknown" and f.color != "unknown" for things in found for f in things]
    assert sum(map(bool, found)) >= 11  # no empty canvases
    assert np.mean(known) >= 0.8


def train(folder, parts, steps, stop=None):
    tokenizer, reader = parts
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(32, 4, 8, 8, generator=generator)
    layout = torch.randint(0, 3, (32, 16, 2), generator=generator)
    data = lessons.Lessons(latents, [CAPTIONS[i % 2] for i in range(32)], layout)
    torch.manual_seed(3)
    unet = build_unet(8, 8, (16, 32))
    settings = lessons.LessonSettings(steps=steps, batch=8, report=stop or steps)
    known = CaptionTable(tokenizer, (reader,), lessons.encode_last)
    lessons.train_unet(
        folder, unet, known, lessons.Teacher(load_pocket(), 1.5), data, settings, dict
    )
    return unet


def test_the_unet_learns_what_the_teacher_says(parts, tmp_path):
    train(tmp_path, parts, 60, stop=20)
    first, *_, last = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert last["loss"] < 0.7 * first["loss"]
    assert last["layout"] < first["layout"]


def test_only_what_has_a_layout_is_taught(tmp_path):
    with pytest.raises(UserError, match="no layout of signs"):
        pretrain_sd(sign_skill(), tmp_path, 0)


def trained(name: str, folder: Path) -> Trainer:
    """Two iterations of a recipe on a tiny StableDiffusionPipeline; its LoRA has moved."""
    recipe = Recipe.load(
        name,
        [
            f"run.dir={folder / 'run'}",
            "rewards={redness: 1.0}",
            "eval={metrics: [], every: 0}",
            "rollout.call={height: 32, width: 32}",
            "group_size=3",
            "groups_per_iteration=2",
            "train.iterations=2",
            "samples.count=0",
        ],
    )
    trainer = Trainer(
        model=build("sd15"), train_dataset=PROMPTS, eval_dataset=PROMPTS, recipe=recipe
    )
    before = [p.detach().clone() for p in trainer.policy.parameters()]
    trainer.train()
    assert trainer.iteration == 2
    after = trainer.policy.parameters()
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return trainer


@pytest.mark.parametrize(("sampler", "calls"), [("ddim", 10), ("plms", 11)])
def test_its_recipes_train_a_model_that_predicts_noise(sampler, calls, tmp_path):
    trainer = trained(f"pocket-sd-{sampler}", tmp_path)
    cond = trainer.model.encode(PROMPTS[:1], guidance=False)
    made = trainer.model.rollout(
        cond, steps=10, scheduler=trainer.scheduler, decode=False, record=True
    )
    assert (len(made.steps), len(made.levels)) == (calls, 10)


def test_ddpo_trains_it_too(tmp_path):
    trained("pocket-sd-ddpo", tmp_path)
    ours, theirs = Recipe.load("pocket-sd-ddim"), Recipe.load("pocket-sd-ddpo")
    for key in ("model", "rewards", "prompts", "group_size", "groups_per_iteration", "lora", "ema"):
        assert getattr(ours, key) == getattr(theirs, key), key
    assert ours.rollout.scheduler == theirs.eval.scheduler
