"""Rewards of videos: any reward of pictures, averaged over the frames.

Licence, range and direction: those of the reward inside.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dgpo.errors import UserError
from dgpo.pictures import Picture
from dgpo.registry import resolve
from dgpo.rewards.entry import numbers
from dgpo.rewards.reward import Media, Reward, RewardFunction, Texts, as_reward, name_of
from dgpo.rewards.wrappers import Wrapper


class PerFrame(Wrapper):
    """The mean of a picture's reward over the frames of each video.

    Args:
        reward: a reward's name, or whatever may be given as a reward.
        frames: how many frames are scored, spread evenly from the first to the last; None: all.
    """

    media = "videos"
    group_wise = False
    """The frames are in no group: a reward that compares pictures refuses them."""

    def __init__(self, reward: str | RewardFunction, frames: int | None = None) -> None:
        if frames is not None and frames < 1:
            raise UserError(f"frames = {frames}: at least one frame must be scored")
        self.name = f"video_{reward if isinstance(reward, str) else name_of(reward)}"
        self._given = reward
        self._frames = frames

    @functools.cached_property
    def inner(self) -> Reward:
        """The reward of pictures; a name is looked up when it is needed."""
        given = self._given
        return as_reward(resolve("reward", given) if isinstance(given, str) else given)

    def __call__(self, images: Media, prompts: Texts, **columns: Any) -> list[float]:
        """One score for each video.

        Args:
            images: B videos: tensors uint8 [T, 3, H, W], lists of pictures, or arrays uint8
                [T, H, W, 3].
            prompts: the caption of each.
            columns: metadata, repeated for the frames.

        Raises:
            UserError: a row is no video, or the reward's answer is not a finite number a frame.
        """
        frames, texts, repeated, counts = self._spread(images, prompts, columns)
        if not frames:
            return []
        answer = numbers(self.inner.name, self.inner.alone(frames, texts, **repeated), texts)
        parts = torch.tensor(answer, dtype=torch.float32).split(counts)
        return [float(part.double().mean()) for part in parts]

    def alone(self, images: Media, prompts: Texts, **columns: Any) -> list[float]:
        """The same: frames are in no group in any case."""
        return self(images, prompts, **columns)

    def announce(self, images: Media, prompts: Texts, **columns: Any) -> None:
        """Announce the frames."""
        frames, texts, repeated, _ = self._spread(images, prompts, columns)
        self.inner.announce(frames, texts, **repeated)

    def _spread(
        self, videos: Sequence[Any], prompts: Sequence[str], columns: dict[str, Sequence[Any]]
    ) -> tuple[list[Image.Image], list[str], dict[str, list[Any]], list[int]]:
        """The frames of all videos with what belongs to each, and how many each video has."""
        frames: list[Image.Image] = []
        rows: list[int] = []
        counts: list[int] = []
        for row, video in enumerate(videos):
            pictures = frames_of(video)
            if pictures is None:
                raise UserError(
                    f"row {row} is {type(video).__name__}, not a video: a tensor uint8 [frames, 3, "
                    "height, width], a list of pictures, or an array uint8 [frames, height, "
                    "width, 3]"
                )
            if self._frames is not None and self._frames < len(pictures):
                places = np.linspace(0, len(pictures) - 1, self._frames).round().astype(int)
                pictures = [pictures[place] for place in places]
            frames += pictures
            rows += [row] * len(pictures)
            counts.append(len(pictures))
        repeated = {key: [column[row] for row in rows] for key, column in columns.items()}
        return frames, [prompts[row] for row in rows], repeated, counts


def frames_of(video: Any) -> list[Image.Image] | None:
    """The frames of a tensor uint8 [T, 3, H, W], a list of pictures, or an array uint8
    [T, H, W, 3]; None: it is no video."""
    if isinstance(video, Tensor) and video.ndim == 4 and video.shape[1] == 3:
        video = [Picture(frame) for frame in video.permute(0, 2, 3, 1).cpu()]
    if isinstance(video, np.ndarray) and video.ndim == 4 and video.dtype == np.uint8:
        video = [Image.fromarray(frame) for frame in video]
    frames = video if isinstance(video, (list, tuple)) else []
    if not frames or not all(isinstance(frame, Image.Image) for frame in frames):
        return None
    return list(frames)


video_clip = PerFrame("clip")
video_pickscore = PerFrame("pickscore")
video_aesthetic = PerFrame("aesthetic")
