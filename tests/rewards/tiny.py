"""Tiny models of random weights in folders, for the real loading paths."""

import json

import numpy as np
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from dgpo.rewards.offload import networks
from dgpo.rewards.shipped.video import PerFrame
from dgpo.rewards.wrappers import Lazy, Ranked


def pictures(count, size=(40, 48), seed=0):
    """Random pictures; ``size`` is width, height."""
    random = np.random.default_rng(seed)
    return [
        Image.fromarray(random.integers(0, 255, (size[1], size[0], 3), np.uint8))
        for _ in range(count)
    ]


def held(reward):
    """The networks that are found in a reward as deep as the package's own may lie: ranked, of a
    video, built when it is needed."""
    lazy = Lazy(type(reward))
    lazy.inner = reward
    return networks([Ranked(PerFrame(lazy))])


def clip_config():
    small = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return CLIPConfig(
        text_config={**small, "vocab_size": 64, "eos_token_id": 27, "bos_token_id": 26},
        vision_config={**small, "image_size": 32, "patch_size": 8},
        projection_dim=8,
    )


def save_clip(place, seed=0):
    """A CLIP model with tokenizer and image processor; returns the folder."""
    save_clip_processors(place)
    torch.manual_seed(seed)
    model = CLIPModel(clip_config())
    with torch.no_grad():
        # the towers' default weights are so small that all pictures look alike
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(place)
    return str(place)


def save_clip_processors(place):
    place.mkdir(exist_ok=True, parents=True)
    letters = [*"abcdefghijklmnopqrstuvwxyz", "<|startoftext|>", "<|endoftext|>"]
    words = {w: i for i, w in enumerate([*letters, *[f"{c}</w>" for c in letters[:26]]])}
    (place / "vocab.json").write_text(json.dumps(words))
    (place / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(place / "vocab.json"), str(place / "merges.txt"))
    tokenizer.save_pretrained(place)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(place)
    clip_config().save_pretrained(place)


def clip_vectors(folder, images, texts):
    """Unit vectors of both towers, one row at a time, by the models' own parts."""
    model = CLIPModel.from_pretrained(folder).eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    processor = CLIPImageProcessor.from_pretrained(folder)
    seen, read = [], []
    with torch.no_grad():
        for image in images:
            pooled = model.vision_model(**processor(image, return_tensors="pt")).pooler_output
            seen.append(model.visual_projection(pooled)[0])
        for text in texts:
            pooled = model.text_model(**tokenizer(text, return_tensors="pt")).pooler_output
            read.append(model.text_projection(pooled)[0])
    return [[v / v.norm() for v in vectors] for vectors in (seen, read)]
