"""HPSv2.1: how much people prefer a picture for a prompt, learned from 798,000 choices.

Source: Wu et al., "Human Preference Score v2" (arXiv 2306.09341). Weights: ``xswu/HPSv2``
(``HPS_v2.1_compressed.pt``, 4 GB), Apache-2.0: an open_clip ViT-H/14, read into transformers'
CLIPModel without open_clip. Range [-1, 1], in practice 0.2 to 0.35; higher is better.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dgpo.rewards.loading import (
    chosen,
    loading,
    pad_square,
    processors,
    read_weights,
)
from dgpo.rewards.reward import Media, Texts
from dgpo.rewards.shipped.clip import ClipEncoder, ClipReward
from dgpo.rewards.wrappers import Lazy

WEIGHTS = "xswu/HPSv2"
FILE = "HPS_v2.1_compressed.pt"
BASE = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
"""HPSv2 was trained with the architecture, tokenizer and image processor of this model."""
VARIABLE = "DGPO_HPSV2"

_TOWERS = {"visual.": "vision_model", "": "text_model"}
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")
_PARTS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_SINGLE = {
    "logit_scale": "logit_scale",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    # transformers' own spelling
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}


def from_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of an open_clip model to those of transformers' CLIPModel.

    Query, key and value are one matrix there and three here; projections are transposed.

    Raises:
        ValueError: a weight belongs to no CLIP model.
    """
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        if key in _SINGLE:
            renamed[_SINGLE[key]] = value
        elif key in ("text_projection", "visual.proj"):
            name = "text_projection" if key == "text_projection" else "visual_projection"
            renamed[f"{name}.weight"] = value.T.contiguous()
        elif found := _BLOCK.fullmatch(key):
            layer = f"{_TOWERS[found[1] or '']}.encoder.layers.{found[2]}."
            if found[3].startswith("attn.in_proj_"):
                kind = found[3].removeprefix("attn.in_proj_")
                for part, rows in zip("qkv", value.chunk(3), strict=True):
                    renamed[f"{layer}self_attn.{part}_proj.{kind}"] = rows.clone()
            else:
                part, _, kind = found[3].rpartition(".")
                if part not in _PARTS:
                    raise ValueError(f"unknown weight {key!r}")
                renamed[f"{layer}{_PARTS[part]}.{kind}"] = value
        elif key != "attn_mask":
            raise ValueError(f"unknown weight {key!r}")
    return renamed


class HPSv2(ClipReward):
    """``cos(image, text)`` of the fine-tuned CLIP model.

    Args:
        weights: the published ``.pt`` file, a folder or hub repository with it, or a folder with a
            CLIPModel of transformers; default: what ``DGPO_HPSV2`` says, else the published one.
        base: hub id or folder of the architecture and processors for a ``.pt`` file; where the hub
            is out of reach, ``DGPO_HPSV2_BASE``.
        batch: how many pictures are scored at once.

    Raises:
        UserError: they cannot be loaded.
    """

    name = "hpsv2"

    def __init__(
        self, weights: str | None = None, base: str | None = None, batch: int = 16
    ) -> None:
        place = chosen(weights, VARIABLE, WEIGHTS)
        if (Path(place) / "config.json").is_file():
            super().__init__(ClipEncoder.load(place, self.name, VARIABLE, batch))
            return
        with loading(self.name, base, f"{VARIABLE}_BASE", BASE) as base:
            from transformers import CLIPConfig, CLIPModel

            config = CLIPConfig.from_pretrained(base)
            pixels, tokens = processors(base)
        with loading(self.name, place, VARIABLE):
            model = CLIPModel(config)
            state = from_open_clip(read_weights(place, FILE))
            missing, unexpected = model.load_state_dict(state, strict=False)
            wrong = [*unexpected, *(key for key in missing if "position_ids" not in key)]
            if wrong:
                raise ValueError(f"weights missing or too many: {', '.join(wrong)}")
        super().__init__(ClipEncoder(model, pixels, tokens, batch))

    def __call__(self, images: Media, prompts: Texts, **columns: Any) -> list[float]:
        """One score for each picture."""
        return self._encoder.cosines([pad_square(image) for image in images], prompts)


hpsv2 = Lazy(HPSv2)
