"""Reward models are on their device while they are asked, and off it otherwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from dgpo import registry
from dgpo.prompts import load_prompts
from dgpo.rewards import Reward, load_rewards
from dgpo.rewards.offload import networks
from rewards.tiny import pictures, save_clip


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


class Distant:
    __name__ = "far"

    def __init__(self) -> None:
        self.inner = {"scorer": [Far()]}
        self.seen: list[str] = []

    def __call__(self, images: Any, prompts: Any) -> list[float]:
        self.seen.append(self.inner["scorer"][0].place)
        return [0.0] * len(images)


def test_networks_come_and_go_around_each_call() -> None:
    reward = Distant()
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

    class Holder(Reward):
        def __init__(self, part: Any) -> None:
            self.part, self.same = part, one

    assert {id(n) for n in networks([Holder([Holder({"a": other})])])} == {id(one), id(other)}
    assert networks([lambda images, prompts: one]) == []


def test_an_object_of_a_foreign_class_shows_its_own_networks_or_says_which_they_are() -> None:
    one, other = nn.Linear(1, 1), nn.Linear(1, 1)

    class Deep:
        """A network is hidden in an attribute that is no reward."""

        def __init__(self) -> None:
            self.helper, self.near = type("Helper", (), {"network": one})(), other

        def __call__(self, images: Any, prompts: Any) -> list[float]:
            return [0.0] * len(images)

    class Told(Deep):
        def modules(self) -> list[nn.Module]:
            return [self.helper.network]

    class Network(nn.Sequential):
        def forward(self, images: Any, prompts: Any) -> list[float]:
            return [0.0] * len(images)

    assert networks([Deep()]) == [other] and networks([Told()]) == [one]
    assert networks([network := Network(one, other)]) == [network, one, other]


@pytest.mark.parametrize("name", ["clip", "pickscore", "video_clip", "video_pickscore"])
def test_the_network_of_a_registered_reward_is_found(name, tmp_path, monkeypatch) -> None:
    folder = save_clip(tmp_path)
    monkeypatch.setenv("DGPO_CLIP", folder)
    monkeypatch.setenv("DGPO_PICKSCORE", folder)
    lazy = registry.resolve("reward", name.removeprefix("video_"))
    before = vars(lazy).pop("inner", None)
    reward = registry.resolve("reward", name)
    try:
        given = [pictures(2)] if name.startswith("video_") else pictures(1)
        assert networks([reward]) == [], "not loaded yet"
        load_rewards([name])(given, load_prompts(["a cat"]))
        assert [type(network).__name__ for network in networks([reward])] == ["CLIPModel"]
    finally:
        vars(lazy).pop("inner", None)
        if before is not None:
            vars(lazy)["inner"] = before


def test_no_registered_reward_hides_its_network_from_the_search() -> None:
    """A function's cache cannot be looked into: rewards with weights are objects."""
    for name, entry in registry.REWARDS.items():
        if entry.weights:
            found = registry.resolve("reward", name)
            assert isinstance(found, Reward) or issubclass(found, Reward), name
