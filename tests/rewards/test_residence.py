"""Reward models are on their device while they are asked, and off it otherwise."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import nn

from dgpo.prompts import load_prompts
from dgpo.rewards import load_rewards
from dgpo.rewards.residence import networks


class Far(nn.Linear):
    """Says that it lies on a device that is not there, and notes where it is sent."""

    def __init__(self) -> None:
        super().__init__(1, 1)
        self.sent: list[str] = []
        self.place = "cuda:0"

    def parameters(self, recurse: bool = True) -> Any:
        class Weight:
            device = torch.device(self.place)

        return iter([Weight()])

    def to(self, device: Any) -> Any:
        self.place = str(device)
        self.sent.append(self.place)
        return self


class Reward:
    __name__ = "far"

    def __init__(self) -> None:
        self.inner = {"scorer": [Far()]}
        self.seen: list[str] = []

    def __call__(self, images: Any, prompts: Any) -> list[float]:
        self.seen.append(self.inner["scorer"][0].place)
        return [0.0] * len(images)


def test_networks_come_and_go_around_each_call() -> None:
    reward = Reward()
    rewards, rows = load_rewards(reward), load_prompts(["a cat"])
    (network,) = networks([reward])
    assert isinstance(network, Far)
    rewards([Image.new("RGB", (2, 2))], rows)
    assert network.sent == []
    rewards.offload()
    for _ in range(2):
        rewards([Image.new("RGB", (2, 2))], rows)
        assert network.place == "cpu"
    assert reward.seen == ["cuda:0"] * 3
    assert network.sent == ["cpu", "cuda:0", "cpu"]


def test_networks_are_found_once_wherever_they_are_held() -> None:
    one, other = nn.Linear(1, 1), nn.Linear(1, 1)

    class Holder:
        def __init__(self, part: Any) -> None:
            self.part, self.same = part, one

    assert {id(n) for n in networks([Holder([Holder({"a": other})])])} == {id(one), id(other)}
    assert networks([lambda images, prompts: one]) == []
