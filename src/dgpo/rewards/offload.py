"""Where the networks of rewards lie while nothing is scored."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

_DEPTH = 6
"""As deep as the CLIP of a ranked GenEval lies."""


class Offload:
    """Keeps the networks of rewards off their device but while they are asked.

    A reward is loaded where it wants to be, at its first call. From then on it lies in the CPU's
    memory between calls, and is back where it was when it is asked again.

    Args:
        rewards: functions or objects; networks are looked for in their attributes.
    """

    away = "cpu"
    """Where the networks lie between calls."""

    def __init__(self, rewards: Iterable[Any]) -> None:
        self._rewards = list(rewards)
        self._away: list[tuple[nn.Module, torch.device]] = []

    @contextmanager
    def home(self) -> Iterator[None]:
        """The networks are on their devices inside the block, and on the CPU after it."""
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


def networks(holders: Iterable[Any]) -> list[nn.Module]:
    """The networks that objects hold, each once: in attributes, lists and dicts, a few deep."""
    found: dict[int, nn.Module] = {}
    seen: set[int] = set()
    waiting = [(holder, 0) for holder in holders]
    while waiting:
        holder, depth = waiting.pop()
        if id(holder) in seen or depth > _DEPTH:
            continue
        seen.add(id(holder))
        if isinstance(holder, nn.Module):
            found[id(holder)] = holder
        elif not isinstance(holder, (type, ModuleType, FunctionType, torch.Tensor)):
            waiting += [(part, depth + 1) for part in _parts(holder)]
    return list(found.values())


def _parts(holder: Any) -> Iterable[Any]:
    if isinstance(holder, dict):
        return holder.values()
    if isinstance(holder, (list, tuple)):
        return holder
    return vars(holder).values() if hasattr(holder, "__dict__") else ()
