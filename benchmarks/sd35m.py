"""Pipelines of the shape of Stable Diffusion 3.5 Medium with random weights, from configs alone.

The configs are those of the tests (tests/planning/configs/sd35m), wherever a benchmark is started.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from dgpo.planning.skeleton import skeleton

CONFIGS = Path(__file__).resolve().parents[1] / "tests" / "planning" / "configs" / "sd35m"
PROMPTS = [
    f"a photo of {number} {colour} {thing}"
    for number in ("two", "three")
    for colour in ("red", "blue", "green")
    for thing in ("cat", "dog")
]
# embeddings keep their real shapes, and nobody waits for encoders that no pass needs
SHALLOW = {
    "text_encoder": {"num_hidden_layers": 1},
    "text_encoder_2": {"num_hidden_layers": 1},
    "text_encoder_3": {"num_layers": 1, "num_decoder_layers": 1},
}
_CLIP = {"hidden_size": 16, "projection_dim": 16, "intermediate_size": 16, "num_attention_heads": 2}
NARROW = {
    "transformer": {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "caption_projection_dim": 16,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
        "sample_size": 8,
        "pos_embed_max_size": 8,
    },
    "vae": {"block_out_channels": [32] * 4, "layers_per_block": 1, "sample_size": 16},
    "text_encoder": _CLIP,
    "text_encoder_2": _CLIP,
    "text_encoder_3": {"d_model": 32, "d_ff": 16, "d_kv": 8, "num_heads": 2},
}
"""What makes every width tiny and leaves the depth."""


def pipeline(
    device: torch.device | str, precision: Any, narrow: bool = False, layers: int | None = None
) -> Any:
    """A pipeline with random weights, the same ones at every call.

    Args:
        device: where the weights are made.
        precision: their precision, by its name.
        narrow: whether all widths are tiny.
        layers: the blocks of the denoiser; None for the real 24.
    """
    with TemporaryDirectory() as folder:
        place = Path(folder) / "sd35m"
        shutil.copytree(CONFIGS, place)
        for changes in (SHALLOW, NARROW if narrow else {}):
            for part, values in changes.items():
                _change(place / part / "config.json", values)
        if layers is not None:
            _change(place / "transformer" / "config.json", {"num_layers": layers})
        with torch.random.fork_rng(devices=_cuda(device)):
            torch.manual_seed(0)
            pipe = skeleton(str(place), precision, device=device)
            _fill(pipe.transformer.parameters())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _change(file: Path, values: dict[str, Any]) -> None:
    file.chmod(0o644)
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def _cuda(device: torch.device | str) -> list[int]:
    return [torch.cuda.current_device()] if torch.device(device).type == "cuda" else []


def _fill(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        # what begins at zero would hide what comes before it
        if not parameter.is_meta and not parameter.detach().any():
            nn.init.normal_(parameter, std=0.02)
