"""What rewards with a model share: loaded once, at the first call or check, with clear errors."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dgpo.errors import UserError


class Lazy:
    """A reward that is built at its first call or check.

    A recipe's names must cost nothing until they are used, and a download that fails must do so
    before the run starts: the trainer calls ``check`` first.

    Args:
        name: what errors and tables call it.
        build: makes the reward, ``(images, prompts, **columns) -> list of float``.
        media: what it scores, which a server must know before: pictures, videos or sounds.
    """

    def __init__(
        self, name: str, build: Callable[[], Callable[..., list[float]]], media: str = "pictures"
    ) -> None:
        self.__name__ = name
        self.media = media
        self._build = build

    @functools.cached_property
    def reward(self) -> Callable[..., list[float]]:
        """The reward itself."""
        return self._build()

    def check(self, prompts: Sequence[Any]) -> None:
        """Load the reward, and let it refuse prompts if it has a ``check`` of its own.

        Raises:
            UserError: it cannot be loaded, or as the reward says.
        """
        check = getattr(self.reward, "check", None)
        if check is not None:
            check(prompts)

    def __call__(
        self, images: Sequence[Any], prompts: Sequence[str], **columns: Any
    ) -> list[float]:
        """One score for each picture."""
        return self.reward(images, prompts, **columns)


def device() -> str:
    """Where reward models run; asked at each call, because the policy's device comes first."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def batches(size: int, *columns: Sequence[Any]) -> Iterator[tuple[list[Any], ...]]:
    """Slices of equal place of all columns, ``size`` rows each."""
    for start in range(0, len(columns[0]), size):
        yield tuple(list(column[start : start + size]) for column in columns)


def pad_square(image: Image.Image, color: tuple[int, int, int] = (0, 0, 0)) -> Image.Image:
    """The picture in the middle of a square of one colour: it is scaled whole, not cropped."""
    image = image.convert("RGB")
    side = max(image.size)
    if image.size == (side, side):
        return image
    square = Image.new("RGB", (side, side), color)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def chosen(given: str | None, variable: str, default: str) -> str:
    """Where a model is: the argument, else the environment variable, else the published one."""
    return given or os.environ.get(variable) or default


@contextlib.contextmanager
def loading(reward: str, what: str, variable: str) -> Iterator[None]:
    """Turn what libraries raise while they load into one line that says what to do.

    Raises:
        UserError: with the model, the library's reason, and the variable that names a folder.
    """
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, ImportError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:240]
        raise UserError(
            f"reward {reward!r}: cannot load {what!r} ({reason}); "
            f"download it and set {variable} to where it is"
        ) from error


def need(reward: str, module: str, install: str) -> None:
    """Refuse to go on without a package.

    Raises:
        UserError: it is not installed; the message is the line that installs it.
    """
    if importlib.util.find_spec(module) is None:
        raise UserError(f"reward {reward!r} needs {module}: {install}")


def weights_file(place: str, file: str) -> Path:
    """A file of weights: a path to it, a folder that holds it, or a hub repository that does."""
    path = Path(place).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        if not (path / file).is_file():
            raise FileNotFoundError(f"the folder holds no {file}")
        return path / file
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(place, file))


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file, or of a torch file with nothing else in it.

    A checkpoint's ``state_dict`` is unwrapped; code in a pickle is never run.

    Raises:
        ValueError: the file holds more than tensors.
    """
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError("the file holds more than tensors; it is not opened") from error
    state = state.get("state_dict", state)
    return {key.removeprefix("module."): value for key, value in state.items()}
