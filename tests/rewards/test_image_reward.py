"""ImageReward: a checkpoint by BLIP's names, read and run as its formula says."""

import math

import pytest
import torch
from transformers import BertTokenizer, CLIPImageProcessor

from dgpo.errors import UserError
from dgpo.rewards.shipped.image_reward import MEAN, STD, ImageReward
from rewards.tiny import held, pictures

WIDTH, HIDDEN, LAYERS = 128, 64, 2  # two heads of 64 in the picture's tower, one in the text's
IMAGES = pictures(3, (40, 48))
TEXTS = ["a cat", "two red dogs and a cat", "a dog"]


def checkpoint():
    """Random weights by the names of the published file."""
    generator = torch.Generator().manual_seed(0)
    state = {}

    def linear(name, rows, columns, scale=0.15):
        state[f"{name}.weight"] = scale * torch.randn(rows, columns, generator=generator)
        state[f"{name}.bias"] = scale * torch.randn(rows, generator=generator)

    def norm(name, size):
        state[f"{name}.weight"] = 1 + 0.2 * torch.randn(size, generator=generator)
        state[f"{name}.bias"] = 0.2 * torch.randn(size, generator=generator)

    seen = "blip.visual_encoder"
    state[f"{seen}.cls_token"] = torch.randn(1, 1, WIDTH, generator=generator)
    state[f"{seen}.pos_embed"] = torch.randn(1, 17, WIDTH, generator=generator)
    linear(f"{seen}.patch_embed.proj", WIDTH, 3 * 64, 0.1)
    weight = state[f"{seen}.patch_embed.proj.weight"]
    state[f"{seen}.patch_embed.proj.weight"] = weight.reshape(WIDTH, 3, 8, 8)
    for layer in range(LAYERS):
        at = f"{seen}.blocks.{layer}"
        norm(f"{at}.norm1", WIDTH)
        norm(f"{at}.norm2", WIDTH)
        linear(f"{at}.attn.qkv", 3 * WIDTH, WIDTH)
        linear(f"{at}.attn.proj", WIDTH, WIDTH)
        linear(f"{at}.mlp.fc1", 96, WIDTH)
        linear(f"{at}.mlp.fc2", WIDTH, 96)
    norm(f"{seen}.norm", WIDTH)
    read = "blip.text_encoder"
    state[f"{read}.embeddings.word_embeddings.weight"] = torch.randn(
        12, HIDDEN, generator=generator
    )
    state[f"{read}.embeddings.position_embeddings.weight"] = torch.randn(
        40, HIDDEN, generator=generator
    )
    state[f"{read}.embeddings.position_ids"] = torch.arange(40)[None]
    norm(f"{read}.embeddings.LayerNorm", HIDDEN)
    for layer in range(LAYERS):
        at = f"{read}.encoder.layer.{layer}"
        for attention, inputs in (("attention", HIDDEN), ("crossattention", WIDTH)):
            linear(f"{at}.{attention}.self.query", HIDDEN, HIDDEN)
            linear(f"{at}.{attention}.self.key", HIDDEN, inputs)
            linear(f"{at}.{attention}.self.value", HIDDEN, inputs)
            linear(f"{at}.{attention}.output.dense", HIDDEN, HIDDEN)
            norm(f"{at}.{attention}.output.LayerNorm", HIDDEN)
        linear(f"{at}.intermediate.dense", 96, HIDDEN)
        linear(f"{at}.output.dense", HIDDEN, 96)
        norm(f"{at}.output.LayerNorm", HIDDEN)
    widths = [HIDDEN, 1024, 128, 64, 16, 1]
    for place, a, b in zip((0, 2, 4, 6, 7), widths, widths[1:], strict=False):
        linear(f"mlp.layers.{place}", b, a, 1 / math.sqrt(a))
    state["blip.vision_proj.weight"] = torch.zeros(2, 2)  # of pretraining, not needed
    return state


def apply(state, name, x):
    return x @ state[f"{name}.weight"].flatten(1).T + state[f"{name}.bias"]


def normed(state, name, x, eps):
    return torch.nn.functional.layer_norm(
        x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps
    )


def attend(query, key, value, heads):
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(0, 1) for x in (query, key, value))
    weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
    return (weights @ v).transpose(0, 1).flatten(1)


def by_hand(state, pixels, tokens):
    """The published forward pass of one picture [3, 32, 32] and one text [L], no padding."""
    gelu = torch.nn.functional.gelu
    at = "blip.visual_encoder"
    patches = pixels.unfold(1, 8, 8).unfold(2, 8, 8).permute(1, 2, 0, 3, 4).reshape(16, -1)
    x = torch.cat([state[f"{at}.cls_token"][0], apply(state, f"{at}.patch_embed.proj", patches)])
    x = x + state[f"{at}.pos_embed"][0]
    for layer in range(LAYERS):
        block = f"{at}.blocks.{layer}"
        qkv = apply(state, f"{block}.attn.qkv", normed(state, f"{block}.norm1", x, 1e-6))
        x = x + apply(state, f"{block}.attn.proj", attend(*qkv.chunk(3, -1), heads=2))
        hidden = gelu(apply(state, f"{block}.mlp.fc1", normed(state, f"{block}.norm2", x, 1e-6)))
        x = x + apply(state, f"{block}.mlp.fc2", hidden)
    picture = normed(state, f"{at}.norm", x, 1e-6)
    at = "blip.text_encoder"
    x = state[f"{at}.embeddings.word_embeddings.weight"][tokens]
    x = x + state[f"{at}.embeddings.position_embeddings.weight"][: len(tokens)]
    x = normed(state, f"{at}.embeddings.LayerNorm", x, 1e-12)
    for layer in range(LAYERS):
        block = f"{at}.encoder.layer.{layer}"
        for attention in ("attention", "crossattention"):
            source = x if attention == "attention" else picture
            part = f"{block}.{attention}"
            query = apply(state, f"{part}.self.query", x)
            key, value = (apply(state, f"{part}.self.{n}", source) for n in ("key", "value"))
            out = apply(state, f"{part}.output.dense", attend(query, key, value, heads=1))
            x = normed(state, f"{part}.output.LayerNorm", x + out, 1e-12)
        hidden = gelu(apply(state, f"{block}.intermediate.dense", x))
        out = apply(state, f"{block}.output.dense", hidden)
        x = normed(state, f"{block}.output.LayerNorm", x + out, 1e-12)
    raw = x[0]
    for place in (0, 2, 4, 6, 7):
        raw = apply(state, f"mlp.layers.{place}", raw)
    return float((raw - MEAN) / STD)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("image_reward")
    torch.save(checkpoint(), place / "ImageReward.pt")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "two", "red", "dogs", "dog"]
    (place / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizer(str(place / "vocab.txt")).save_pretrained(place)
    return str(place)


def test_the_score_is_the_published_formula(folder):
    reward = ImageReward(folder, folder, batch=2)
    got = reward(IMAGES, TEXTS)  # texts of two lengths in a batch
    assert held(reward)
    tokenizer = BertTokenizer.from_pretrained(folder)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    for image, text, score in zip(IMAGES, TEXTS, got, strict=True):
        pixels = processor(image, return_tensors="pt")["pixel_values"][0]
        tokens = tokenizer(text, return_tensors="pt")["input_ids"][0]
        assert score == pytest.approx(by_hand(checkpoint(), pixels, tokens), abs=1e-4)
    assert max(got) - min(got) > 1e-2
    other = ImageReward(folder, folder)(IMAGES[1:2], TEXTS[:1])
    assert abs(other[0] - got[0]) > 1e-4  # the picture matters


def test_long_prompts_are_cut_at_35_tokens(folder):
    reward = ImageReward(folder, folder)
    short, long = reward(IMAGES[:1] * 2, ["cat " * 33, "cat " * 60])
    assert short == pytest.approx(long, abs=1e-5)


def test_checkpoints_that_are_refused(tmp_path, folder):
    with pytest.raises(UserError, match="DGPO_IMAGE_REWARD"):
        ImageReward(str(tmp_path), folder)
    torch.save({"a": torch.zeros(1)}, tmp_path / "ImageReward.pt")
    with pytest.raises(UserError, match="not a checkpoint of ImageReward"):
        ImageReward(str(tmp_path), folder)
    state = checkpoint()
    del state["blip.text_encoder.encoder.layer.1.output.dense.bias"]
    torch.save(state, tmp_path / "ImageReward.pt")
    with pytest.raises(UserError, match=r"layer\.1\.output\.dense\.bias"):
        ImageReward(str(tmp_path), folder)
