"""What rewards with a model share: where weights come from, clear errors, batches, the device."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dgpo.errors import UserError
from dgpo.pictures import rgb
from dgpo.rewards.pixels import Processor
from dgpo.rewards.reward import Media, Reward, Texts


class ModelReward(Reward):
    """A reward with networks of its own, which scores in batches on the device.

    A subclass loads its networks into attributes and writes :meth:`score`.
    """

    batch: int = 1
    """How many pictures are scored at once."""

    def score(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        """The scores of one batch, [B]; the networks are on the device."""
        raise NotImplementedError

    @torch.no_grad()
    def __call__(self, images: Media, prompts: Texts, **columns: Any) -> list[float]:
        """One score for each picture."""
        for network in self.modules():
            network.to(device())
        parts = batches(self.batch, images, prompts)
        return [score for part in parts for score in self.score(*part).tolist()]


def device() -> str:
    """Where reward models run; asked at each call, because the policy's device comes first."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def precision(on_gpu: torch.dtype = torch.bfloat16) -> torch.dtype:
    """The dtype of a large model's weights: ``on_gpu`` there, float32 on a CPU."""
    return on_gpu if torch.cuda.is_available() else torch.float32


def batches(size: int, *columns: Sequence[Any]) -> Iterator[tuple[list[Any], ...]]:
    """Slices of equal place of all columns, ``size`` rows each."""
    for start in range(0, len(columns[0]), size):
        yield tuple(list(column[start : start + size]) for column in columns)


def pad_square(image: Image.Image, color: tuple[int, int, int] = (0, 0, 0)) -> Image.Image:
    """The picture in the middle of a square of one colour: it is scaled whole, not cropped."""
    image = rgb(image)
    side = max(image.size)
    if image.size == (side, side):
        return image
    square = Image.new("RGB", (side, side), color)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def mean_color(processor: Any) -> tuple[int, int, int]:
    """The colour that an image processor turns into zeros; grey where it does not say."""
    mean = getattr(processor, "image_mean", None) or (0.5, 0.5, 0.5)
    red, green, blue = (int(255 * value) for value in mean)
    return red, green, blue


def chosen(given: str | None, variable: str, published: str) -> str:
    """Where a model is: the argument, else the environment variable, else the published one."""
    return given or os.environ.get(variable) or published


def processors(place: str, **tokenizer: Any) -> tuple[Processor, Any]:
    """The image processor and the tokenizer of a hub id or folder.

    Args:
        place: the hub id or folder.
        tokenizer: settings of the tokenizer.
    """
    from transformers import AutoImageProcessor, AutoTokenizer

    pixels = AutoImageProcessor.from_pretrained(place, use_fast=False)
    return Processor(pixels), AutoTokenizer.from_pretrained(place, **tokenizer)


def file_of(variable: str) -> str | None:
    """The text of the file that an environment variable names; None: it names none.

    Raises:
        UserError: the file cannot be read.
    """
    file = os.environ.get(variable)
    if not file:
        return None
    try:
        return Path(file).expanduser().read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{variable} = {file!r}: {error}") from error


@contextlib.contextmanager
def loading(reward: str, given: str | None, variable: str, published: str = "") -> Iterator[str]:
    """Say where a model is, and turn what libraries raise while they load it into one line.

    >>> with loading("clip", "/models/clip", "DGPO_CLIP", "openai/clip-vit-large-patch14") as place:
    ...     print(place)
    /models/clip

    Args:
        reward: what errors call the reward.
        given, variable, published: see :func:`chosen`.

    Raises:
        UserError: with the model, the library's reason, and the variable that names a folder.
    """
    place = chosen(given, variable, published)
    try:
        yield place
    except UserError:
        raise
    except (OSError, ValueError, ImportError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:240]
        raise UserError(
            f"reward {reward!r}: cannot load {place!r} ({reason}); "
            f"download it and set {variable} to where it is"
        ) from error


def need(who: str, module: str, install: str) -> None:
    """Refuse to go on without a package.

    Raises:
        UserError: it is not installed; the message is the line that installs it.
    """
    if importlib.util.find_spec(module) is None:
        raise UserError(f"{who} needs {module}: {install}")


def read_weights(place: str, name: str) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file, or of a torch file with nothing else in it.

    A checkpoint's ``state_dict`` is unwrapped; code in a pickle is never run.

    Args:
        place: the file, a folder that holds it, or a hub repository that does.
        name: the file's name in a folder or repository.

    Raises:
        FileNotFoundError: the folder does not hold it.
        ValueError: the file holds more than tensors.
    """
    file = _weights_file(place, name)
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError("the file holds more than tensors; it is not opened") from error
    state = state.get("state_dict", state)
    return {key.removeprefix("module."): value for key, value in state.items()}


def _weights_file(place: str, file: str) -> Path:
    path = Path(place).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        if not (path / file).is_file():
            raise FileNotFoundError(f"the folder holds no {file}")
        return path / file
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(place, file))
