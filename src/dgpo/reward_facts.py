"""What `dgpo list rewards` says of each reward; nothing heavy is imported for it."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Facts:
    """A reward at a glance.

    Args:
        about: what it measures.
        range: its values in practice.
        licence: of code and weights beyond this project's own.
        weights: size of what is downloaded at the first use, or where else the weights lie; empty:
            nothing is downloaded.
        package: a module that must be importable.
        install: the line that installs it.
        setting: an environment variable that must be set, and to what (``NAME=VALUE``).
    """

    about: str
    range: str
    licence: str = "own"
    weights: str = ""
    package: str = ""
    install: str = ""
    setting: str = ""

    def missing(self) -> str:
        """What to do before it can be used; empty: nothing."""
        if self.package and importlib.util.find_spec(self.package) is None:
            return self.install
        name, _, value = self.setting.partition("=")
        if name and not os.environ.get(name):
            return f"export {name}={value}"
        return ""


_READER = {"package": "rapidocr_onnxruntime", "install": "pip install 'dgpo[rewards]'"}
_CLIP = "1.7 GB"
_GENEVAL = "2 GB"

FACTS: dict[str, Facts] = {
    "geneval": Facts("objects, counts, colours, places", "to 1", "other, MIT", _GENEVAL),
    "geneval_strict": Facts("the same, all or nothing", "0 or 1", "other, MIT", _GENEVAL),
    "ocr": Facts("the wanted text is read", "0 to 1", "Apache-2.0", **_READER),
    "pickscore": Facts("human preference", "16 to 26", "MIT", "4 GB"),
    "hpsv2": Facts("human preference", "0.2 to 0.35", "Apache-2.0", "4 GB"),
    "hpsv3": Facts("human preference, a 7B judge", "0 to 15", "Apache-2.0", "17 GB"),
    "image_reward": Facts("human preference", "-2.3 to 2", "Apache-2.0", "1.8 GB"),
    "clip": Facts("prompt agreement", "15 to 40", "MIT", _CLIP),
    "vqascore": Facts('P("Yes") that it shows the prompt', "0 to 1", "Llama 2", "14 GB"),
    "unified_reward": Facts(
        "agreement and quality, served",
        "1 to 5",
        "MIT",
        "none: served",
        "httpx",
        "pip install httpx",
        "DGPO_UNIFIED_REWARD_URL=URL",
    ),
    "vlm_judge": Facts(
        "any vision-language model, served",
        "0 to 10",
        "the model's",
        "none: served",
        "httpx",
        "pip install httpx",
        "DGPO_JUDGE_URL=URL",
    ),
    "aesthetic": Facts(
        "beauty; no prompt",
        "4 to 7",
        "Apache-2.0, MIT",
        "1.7 GB",
    ),
    "deqa": Facts(
        "technical quality; no prompt",
        "1 to 5",
        "MIT",
        "16 GB",
        setting="DGPO_TRUST_REMOTE_CODE=deqa",
    ),
    "jpeg_compressibility": Facts("minus the JPEG's kilobytes", "-300 to 0"),
    "jpeg_incompressibility": Facts("the JPEG's kilobytes", "0 to 300"),
    "video_clip": Facts("clip, mean of a video's frames", "15 to 40", "MIT", _CLIP),
    "video_pickscore": Facts("pickscore, mean of a video's frames", "16 to 26", "MIT", "4 GB"),
    "video_aesthetic": Facts(
        "aesthetic, mean of a video's frames", "4 to 7", "Apache-2.0, MIT", "1.7 GB"
    ),
    "clap": Facts(
        "a sound agrees with its prompt",
        "0 to 0.6",
        "Apache-2.0",
        "0.6 GB",
    ),
    "variety": Facts("colours that the rest of the group has not", "0 to 1"),
    "pocket_geneval": Facts("pocket scenes: partial credit", "0 to 1"),
    "pocket_geneval_strict": Facts("pocket scenes: all or nothing", "0 or 1"),
    "pocket_match": Facts("pocket scenes: caption and picture", "-1 to 1"),
    "pocket_quality": Facts("pocket scenes: cleanly drawn", "0 to 1"),
    "pocket_kid": Facts("pocket: distance to drawn scenes (lower is better)", "about 0 up"),
    "pocket_ocr": Facts("pocket signs: wanted digits are read", "0 to 1", "Apache-2.0", **_READER),
    "pocket_ocr_exact": Facts("pocket signs: read and no more", "0 or 1", "Apache-2.0", **_READER),
    "http": Facts(
        "what `dgpo serve` computes elsewhere",
        "as there",
        "as there",
        "none: served",
        "httpx",
        "pip install httpx",
        "DGPO_REWARD_URL=URL",
    ),
    "human": Facts(
        "what people prefer, on a page in the browser",
        "0 to 1",
        package="fastapi",
        install="pip install 'dgpo[serve]'",
    ),
    "redness": Facts("for trying things out", "-1 to 1"),
    "brightness": Facts("for trying things out", "0 to 1"),
}
"""Every registered reward; higher is better unless it says otherwise."""
