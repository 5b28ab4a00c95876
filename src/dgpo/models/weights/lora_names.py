"""How trainers name the tensors of a LoRA, and which layers of a denoiser they mean.

Every name is prefixes, a layer, and which of its matrices it is. Underscores may stand for the
dots of the layer, as in files of kohya's scripts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from diffusers.loaders.lora_conversion_utils import swap_scale_shift
from torch import Tensor

_MATRIX = re.compile(
    r"(?P<layer>.+?)[._]lora(?:_linear_layer)?[._](?P<part>A|B|down|up)"
    r"(?:\.(?!weight$)(?P<adapter>\w+))?\.weight"
)
_ALPHA = re.compile(r"(?P<layer>.+?)(?:[._]lora(?:_linear_layer)?)?[._]alpha")
_PARTS = {"A": "down", "B": "up"}
_TEXT = re.compile(r"(?:\w+\.)*?(?:lora_te\d?_|te\d\.|text_encoders?(?:_\d)?\.|text_model\.)")
DENOISERS = ("transformer", "transformer_2", "unet")
"""The components of pipelines that are trained, and that LoRAs adapt."""
_PREFIX = re.compile(
    rf"(?:module|_orig_mod|base_model|model|diffusion_model|{'|'.join(DENOISERS)})\."
    r"|(?:lora_unet|lora_transformer|lycoris)_"
)
_SECOND = "transformer_2."
_TYPES = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lokr_": "LoKr",
    "hada_": "LoHa",
    "oft_": "OFT",
    "ia3_": "IA3",
    "vera_": "VeRA",
    ".lora_E": "AdaLoRA",
    ".a1.weight": "GLoRA",
    "lora_mid": "a LoRA of three matrices (lora_mid)",
    "lora_embedding": "a LoRA of embeddings",
    "lora_B.bias": "a LoRA with biases (lora_bias)",
}
_SD3 = re.compile(
    r"(?:\w+\.)*?(?:lora_unet_|diffusion_model\.)?joint_blocks[._](\d+)[._](x|context)_block[._]"
    r"(attn2?[._]qkv|attn2?[._]proj|mlp[._]fc1|mlp[._]fc2|adaLN_modulation[._]1)"
)
_SD3_LAYERS = {
    "x": {
        "attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "attn_proj": ("attn.to_out.0",),
        "attn2_qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
        "attn2_proj": ("attn2.to_out.0",),
        "mlp_fc1": ("ff.net.0.proj",),
        "mlp_fc2": ("ff.net.2",),
        "adaLN_modulation_1": ("norm1.linear",),
    },
    "context": {
        "attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "attn_proj": ("attn.to_add_out",),
        "mlp_fc1": ("ff_context.net.0.proj",),
        "mlp_fc2": ("ff_context.net.2",),
        "adaLN_modulation_1": ("norm1_context.linear",),
    },
}
"""The layers of Stable Diffusion 3 by the names of its first release, which diffusers does not
read in LoRAs. One matrix makes queries, keys and values there."""


@dataclass
class Sorted:
    """The tensors of a file by what their names say.

    Args:
        parts: the layer and the part (``down``, ``up`` or ``alpha``) of each tensor of a LoRA.
        texts: those for text encoders.
        others: those of no LoRA.
        adapters: the names of adapters that stand in the keys.
    """

    parts: dict[str, tuple[str, str]] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    adapters: set[str] = field(default_factory=set)


def sort(keys: Iterable[str]) -> Sorted:
    """Sort the names of a file's tensors by what they stand for."""
    made = Sorted()
    for key in keys:
        if _TEXT.match(key):
            made.texts.append(key)
        elif found := _MATRIX.fullmatch(key):
            part = found["part"]
            made.parts[key] = (found["layer"], _PARTS.get(part, part))
            made.adapters |= {found["adapter"]} - {None}
        elif found := _ALPHA.fullmatch(key):
            made.parts[key] = (found["layer"], "alpha")
        else:
            made.others.append(key)
    return made


def other_type(keys: Iterable[str]) -> str | None:
    """Return the type of an adapter that is no plain LoRA, None for a plain one."""
    names = {kind for key in keys for mark, kind in _TYPES.items() if mark in key}
    return min(names, default=None)


def renamed(tensors: Mapping[str, Tensor], down: str, up: str) -> dict[str, Tensor]:
    """Return the matrices of a LoRA with other names of the two."""
    return {
        f"{layer}.{down if part == 'down' else up}.weight": tensors[key]
        for key, (layer, part) in sort(tensors).parts.items()
    }


class Layers:
    """The layers of a pipeline's denoisers, found by the names of any trainer.

    Args:
        names: the names of the layers of each denoiser, by the denoiser's name.
    """

    def __init__(self, names: Mapping[str, Iterable[str]]) -> None:
        self._first = next(iter(names))
        self._by_flat = {
            denoiser: {name.replace(".", "_"): name for name in layers}
            for denoiser, layers in names.items()
        }

    def find(self, written: str) -> tuple[str, str] | None:
        """Return the denoiser and the layer that a name means, None if it means none."""
        denoiser, rest = self._first, written
        while True:
            # attention processors of early diffusers held the matrices, and `to_out` had one layer
            flat = rest.replace(".processor.", ".").replace(".", "_")
            known = self._by_flat.get(denoiser, {})
            for name in (flat, f"{flat}_0"):
                if name in known:
                    return denoiser, known[name]
            if (found := _PREFIX.match(rest)) is None:
                return None
            if found[0] == _SECOND:
                denoiser = _SECOND[:-1]
            rest = rest[found.end() :]


def convert_sd3(tensors: Mapping[str, Tensor], blocks: int) -> dict[str, Tensor]:
    """Rename a LoRA of Stable Diffusion 3 that names the layers of its first release.

    Args:
        tensors: matrices without alphas: ``down`` [rank, in], ``up`` [out, rank].
        blocks: how many the transformer has.
    """
    made: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        found, (_, part) = _SD3.match(key), sort([key]).parts[key]
        if found is None:
            made[key] = tensor
            continue
        number, side, layer = int(found[1]), found[2], found[3].replace(".", "_")
        names = _SD3_LAYERS[side].get(layer, ())
        if part == "up" and layer.startswith("adaLN") and (side, number) == ("context", blocks - 1):
            tensor = swap_scale_shift(tensor)
        pieces = [tensor] * len(names) if part == "down" else tensor.chunk(len(names) or 1)
        for name, piece in zip(names, pieces, strict=False):
            matrix = "lora_A" if part == "down" else "lora_B"
            made[f"transformer.transformer_blocks.{number}.{name}.{matrix}.weight"] = piece
    return made
