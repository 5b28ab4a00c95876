"""Where the networks of rewards lie while nothing is scored."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dgpo.rewards.reward import as_reward
from dgpo.user_code import user_code


class Offload:
    """Keeps the networks of rewards off their device except while they are asked.

    A reward is loaded where it wants to be, at its first call. From then on it lies in the CPU's
    memory between calls, and is back where it was when it is asked again.

    Args:
        rewards: their hook ``modules`` says which networks they hold.
    """

    away = "cpu"
    """Where the networks lie between calls."""

    def __init__(self, rewards: Iterable[Any]) -> None:
        self._rewards = list(rewards)
        self._away: list[tuple[nn.Module, torch.device]] = []

    @contextmanager
    def home(self) -> Iterator[None]:
        """Have the networks on their devices inside the block, and on the CPU after it."""
        while self._away:
            module, device = self._away.pop()
            module.to(device)
        try:
            yield
        finally:
            for module in networks(self._rewards):
                first = next(module.parameters(), None)
                if first is not None and first.device.type not in (self.away, "meta"):
                    self._away.append((module, first.device))
                    module.to(self.away)
            if self._away and torch.cuda.is_available():
                torch.cuda.empty_cache()


def networks(rewards: Iterable[Any]) -> list[nn.Module]:
    """The networks that rewards hold, each once."""
    every: list[nn.Module] = []
    for reward in map(as_reward, rewards):
        with user_code(f"reward {reward.name!r}"):
            every += reward.modules()
    return list({id(module): module for module in every}.values())
