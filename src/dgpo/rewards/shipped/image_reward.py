"""ImageReward: how much people prefer a picture for a prompt, learned from expert comparisons.

Source: Xu et al., "ImageReward" (arXiv 2304.05977). Weights: ``THUDM/ImageReward``
(``ImageReward.pt``, 1.8 GB), Apache-2.0: BLIP ViT-L with a text encoder that attends to the
picture, read into transformers' BLIP without the package ``image-reward`` (which needs
torchvision). In units of the training set's standard deviation, in practice -2.3 to 2; higher is
better.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dgpo.rewards.loading import ModelReward, loading, read_weights
from dgpo.rewards.pixels import Processor
from dgpo.rewards.shipped.aesthetic import linear_head
from dgpo.rewards.wrappers import Lazy

WEIGHTS = "THUDM/ImageReward"
FILE = "ImageReward.pt"
TOKENIZER = "google-bert/bert-base-uncased"
VARIABLE = "DGPO_IMAGE_REWARD"
MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""The mean and deviation of the raw scores on the training set, as published."""
TOKENS = 35
HEAD_WIDTH = 64
"""The width of an attention head in both towers of BLIP."""

_VISION = (
    ("cls_token", "embeddings.class_embedding"),
    ("pos_embed", "embeddings.position_embedding"),
    ("patch_embed.proj.", "embeddings.patch_embedding."),
    ("blocks.", "encoder.layers."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
    (".attn.qkv.", ".self_attn.qkv."),
    (".attn.proj.", ".self_attn.projection."),
)


def from_blip(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], ...]:
    """Split a published checkpoint into weights of BlipVisionModel, BlipTextModel and the head.

    What only BLIP's pretraining used (its momentum towers, projections, decoder) is left out.
    """
    vision, text, head = {}, {}, {}
    for key, value in state.items():
        if key.startswith("blip.visual_encoder."):
            name = key.removeprefix("blip.visual_encoder.")
            for old, new in _VISION:
                name = name.replace(old, new)
            vision[re.sub(r"^norm\.", "post_layernorm.", name)] = value
        elif key.startswith("blip.text_encoder."):
            name = key.removeprefix("blip.text_encoder.").removeprefix("bert.")
            if not name.startswith("pooler.") and not name.endswith("position_ids"):
                text[name] = value
        elif key.startswith("mlp."):
            head[key.removeprefix("mlp.")] = value
    if not (vision and text and head):
        raise ValueError("not a checkpoint of ImageReward: it lacks blip.* or mlp.* weights")
    return vision, text, head


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """How many layers have names of a pattern."""
    found = (re.match(pattern, key) for key in state)
    return 1 + max(int(match[1]) for match in found if match)


class ImageReward(ModelReward):
    """``(head(text encoder attending to the picture) - mean) / std``.

    Args:
        weights: the published file, or a folder or hub repository with it; default: what
            ``DGPO_IMAGE_REWARD`` says, else the published one.
        tokenizer: hub id or folder of BERT's uncased tokenizer; where the hub is out of reach,
            ``DGPO_IMAGE_REWARD_TOKENIZER``.
        batch: how many pictures are scored at once.

    Raises:
        UserError: they cannot be loaded.
    """

    name = "image_reward"

    def __init__(
        self, weights: str | None = None, tokenizer: str | None = None, batch: int = 16
    ) -> None:
        with loading(self.name, weights, VARIABLE, WEIGHTS) as place:
            vision, text, head = from_blip(read_weights(place, FILE))
            self._head = linear_head(head)
            self._vision, self._text = _towers(vision, text)
        with loading(self.name, tokenizer, f"{VARIABLE}_TOKENIZER", TOKENIZER) as words:
            from transformers import AutoTokenizer, CLIPImageProcessor

            self._tokens: Any = AutoTokenizer.from_pretrained(words)
            side = self._vision.config.image_size
            # CLIP's mean and deviation, shorter side scaled, centre cropped: as in its training
            own = CLIPImageProcessor(size={"shortest_edge": side}, crop_size=side)
            self._pixels = Processor(own)
        self.batch = batch

    def score(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        """The standardized scores, [B]; prompts are cut at 35 tokens."""
        where = self._vision.device
        pixels = self._pixels(images, where)
        tokens = self._tokens(
            prompts, padding=True, truncation=True, max_length=TOKENS, return_tensors="pt"
        ).to(where)
        patches = self._vision(**pixels).last_hidden_state
        hidden = self._text(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            encoder_hidden_states=patches,
            encoder_attention_mask=patches.new_ones(patches.shape[:2], dtype=torch.long),
        ).last_hidden_state
        raw = self._head(hidden[:, 0].float()).squeeze(-1)
        return (raw - MEAN) / STD


def _towers(vision: dict[str, Tensor], text: dict[str, Tensor]) -> tuple[Any, Any]:
    """Build both models, with sizes read from the weights themselves."""
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    width, _, patch, _ = vision["embeddings.patch_embedding.weight"].shape
    grid = int((vision["embeddings.position_embedding"].shape[1] - 1) ** 0.5)
    seeing = BlipVisionModel(
        BlipVisionConfig(
            hidden_size=width,
            intermediate_size=vision["encoder.layers.0.mlp.fc1.weight"].shape[0],
            num_hidden_layers=_count(vision, r"encoder\.layers\.(\d+)\."),
            num_attention_heads=max(width // HEAD_WIDTH, 1),
            image_size=grid * patch,
            patch_size=patch,
            layer_norm_eps=1e-6,
        )
    )
    words, hidden = text["embeddings.word_embeddings.weight"].shape
    config = BlipTextConfig(
        vocab_size=words,
        hidden_size=hidden,
        encoder_hidden_size=width,
        intermediate_size=text["encoder.layer.0.intermediate.dense.weight"].shape[0],
        num_hidden_layers=_count(text, r"encoder\.layer\.(\d+)\."),
        num_attention_heads=max(hidden // HEAD_WIDTH, 1),
        max_position_embeddings=text["embeddings.position_embeddings.weight"].shape[0],
    )
    reading = BlipTextModel(config, add_pooling_layer=False)
    seeing.load_state_dict(vision)
    reading.load_state_dict(text)
    return seeing.eval().requires_grad_(False), reading.eval().requires_grad_(False)


image_reward = Lazy(ImageReward)
