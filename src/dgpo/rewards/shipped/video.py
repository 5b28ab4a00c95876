"""Rewards of videos: any reward of pictures, averaged over the frames.

Licence, range and direction: those of the reward inside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from dgpo.errors import UserError
from dgpo.prompts import Prompt
from dgpo.registry import resolve
from dgpo.rewards.set import load_rewards


class PerFrame:
    """The mean of a picture's reward over the frames of each video.

    Its attribute ``media`` tells a server that it is to be sent videos.

    Args:
        reward: a reward's name, or a function ``(images, prompts, **columns) -> list of float``.
        frames: how many frames are scored, spread evenly from the first to the last; None: all.
    """

    media = "videos"

    def __init__(self, reward: str | Callable[..., Any], frames: int | None = None) -> None:
        if frames is not None and frames < 1:
            raise UserError(f"frames = {frames}: at least one frame must be scored")
        inner = reward if isinstance(reward, str) else getattr(reward, "__name__", "reward")
        self.__name__ = f"video_{inner}"
        self._given = reward
        self._frames = frames

    @property
    def _reward(self) -> Any:
        if isinstance(self._given, str):
            self._given = resolve("reward", self._given)
        return self._given

    def check(self, prompts: Sequence[Any]) -> None:
        """Let the reward inside refuse prompts and load its model."""
        check = getattr(self._reward, "check", None)
        if check is not None:
            check(prompts)

    def __call__(self, images: Sequence[Any], prompts: Sequence[str], **columns: Any) -> Any:
        """One score for each video.

        Args:
            images: B videos: tensors uint8 [T, 3, H, W], lists of pictures, or arrays uint8
                [T, H, W, 3].
            prompts: the caption of each.
            columns: metadata, repeated for the frames; they go to a reward that takes ``**``.

        Raises:
            UserError: a row is no video.
        """
        rewards = load_rewards([self._reward])
        frames: list[Image.Image] = []
        rows: list[Prompt] = []
        counts = []
        for row, (video, text) in enumerate(zip(images, prompts, strict=True)):
            pictures = frames_of(video)
            if pictures is None:
                raise UserError(
                    f"row {row} is {type(video).__name__}, not a video: a tensor uint8 [frames, 3, "
                    "height, width], a list of pictures, or an array uint8 [frames, height, "
                    "width, 3]"
                )
            chosen = self._choose(pictures)
            own = {key: column[row] for key, column in columns.items()}
            frames += chosen
            rows += [Prompt(text, own)] * len(chosen)
            counts.append(len(chosen))
        if not frames:
            return []
        scores = rewards(frames, rows).total
        return [float(part.double().mean()) for part in scores.split(counts)]

    def _choose(self, frames: list[Image.Image]) -> list[Image.Image]:
        if self._frames is None or self._frames >= len(frames):
            return frames
        places = np.linspace(0, len(frames) - 1, self._frames).round().astype(int)
        return [frames[place] for place in places]


def frames_of(video: Any) -> list[Image.Image] | None:
    """The frames of a tensor uint8 [T, 3, H, W], a list of pictures, or an array uint8
    [T, H, W, 3]; None: it is no video."""
    if isinstance(video, Tensor) and video.ndim == 4 and video.shape[1] == 3:
        video = video.permute(0, 2, 3, 1).cpu().numpy()
    if isinstance(video, np.ndarray) and video.ndim == 4 and video.dtype == np.uint8:
        video = [Image.fromarray(frame) for frame in video]
    frames = video if isinstance(video, (list, tuple)) else []
    if not frames or not all(isinstance(frame, Image.Image) for frame in frames):
        return None
    return list(frames)


video_clip = PerFrame("clip")
video_pickscore = PerFrame("pickscore")
video_aesthetic = PerFrame("aesthetic")
