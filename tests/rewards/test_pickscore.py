"""PickScore through its real loading path, with a tiny CLIP of random weights."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from dgpo.errors import UserError
from dgpo.rewards.shipped.pickscore import PickScore
from rewards.tiny import save_clip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"))


def test_the_score_is_the_scaled_cosine_of_the_two_projections(folder):
    pixels = np.random.default_rng(0).integers(0, 255, (5, 48, 40, 3), np.uint8)
    images = [Image.fromarray(p) for p in pixels]
    prompts = ["a cat", "two dogs", "a cat", "x", "a long text with many words"]
    got = PickScore(folder, batch=2)(images, prompts)
    model = CLIPModel.from_pretrained(folder).eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    processor = CLIPImageProcessor.from_pretrained(folder)
    for image, prompt, score in zip(images, prompts, got, strict=True):
        with torch.no_grad():
            vision = model.vision_model(**processor(image, return_tensors="pt")).pooler_output
            text = model.text_model(**tokenizer(prompt, return_tensors="pt")).pooler_output
            a, b = model.visual_projection(vision)[0], model.text_projection(text)[0]
        cosine = float(torch.dot(a, b) / a.norm() / b.norm())
        assert score == pytest.approx(model.logit_scale.exp().item() * cosine, abs=1e-4)


def test_the_environment_names_a_folder(folder, monkeypatch):
    monkeypatch.setenv("DGPO_PICKSCORE", folder)
    image = Image.new("RGB", (32, 32), "red")
    assert PickScore()([image], ["a"]) == PickScore(folder)([image], ["a"])


def test_weights_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match="DGPO_PICKSCORE"):
        PickScore(str(tmp_path))
