"""Real reward models, tiny ones, are away while pictures are sampled and back while they score.

Without a second device ``meta`` stands for "away": there are no weights there, so that a network
which is not brought back cannot compute. What comes back are the very weights that went.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dgpo.prompts import load_prompts
from dgpo.rewards import load_rewards
from dgpo.rewards.offload import Offload, networks
from dgpo.rewards.shipped.clip import ClipScore
from dgpo.rewards.shipped.hpsv3 import HPSv3
from dgpo.rewards.shipped.pickscore import PickScore
from dgpo.rewards.shipped.video import PerFrame
from families.tiny import sd3_small
from rewards.tiny import pictures, save_clip
from rewards.tiny_qwen import save_hpsv3
from tiny_runs import light, trainer

IMAGES = pictures(3, (32, 32))
TEXTS = ["a cat", "a dog", "a red dog"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("rewards")
    save_clip(place / "clip")
    save_hpsv3(place)
    return place


def clip(place: Path) -> Any:
    return ClipScore(str(place / "clip"))


def pickscore(place: Path) -> Any:
    return PickScore(str(place / "clip"))


def hpsv3(place: Path) -> Any:
    return HPSv3(str(place), str(place / "base"))


def tensors(network: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """Every dictionary that holds a weight or a buffer, and its name there."""
    for module in network.modules():
        for held in (module._parameters, module._buffers):
            yield from ((held, name) for name, value in held.items() if value is not None)


def devices(network: nn.Module) -> set[str]:
    return {held[name].device.type for held, name in tensors(network)}


@contextmanager
def meta_is_away(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """``to("meta")`` keeps the weights aside, and the way back puts them in place again.

    Only who left knows the way back: a reward's own ``to("cpu")`` finds no weights to copy.

    Yields:
        Where networks were sent.
    """
    shelf: dict[nn.Module, list[Tensor]] = {}
    moves: list[str] = []
    real = nn.Module.to

    def bring(network: nn.Module) -> nn.Module:
        for (held, name), kept in zip(list(tensors(network)), shelf.pop(network), strict=True):
            held[name] = kept
        return network

    def to(self: nn.Module, *given: Any, **named: Any) -> nn.Module:
        if given == ("meta",):
            moves.append("meta")
            shelf[self] = [held[name] for held, name in tensors(self)]
            return real(self, "meta")
        if given == (torch.device("cpu"),) and self in shelf:
            moves.append("cpu")
            return bring(self)
        return real(self, *given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Offload, "away", "meta")
        patch.setattr(nn.Module, "to", to)
        yield moves
    for network in list(shelf):
        bring(network)  # rewards share them with other tests


@pytest.mark.parametrize(("build", "count"), [(clip, 1), (pickscore, 1), (hpsv3, 2)])
def test_networks_are_away_between_calls_and_score_the_same(
    build: Callable[[Path], Any], count: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reward = build(folder)
    wanted = reward(IMAGES, TEXTS)
    rewards, found = load_rewards(reward), networks([reward])
    assert len(found) == count and all(devices(network) == {"cpu"} for network in found)
    with meta_is_away(monkeypatch) as moves:
        rewards.offload()
        for _ in range(2):
            assert rewards(IMAGES, load_prompts(TEXTS)).total.tolist() == pytest.approx(wanted)
            assert all(devices(network) == {"meta"} for network in found)
        away, back = ["meta"] * count, ["cpu"] * count
        assert moves == [*away, *back, *away]
        with pytest.raises(NotImplementedError, match="meta"):
            reward(IMAGES, TEXTS)  # nobody has fetched them


def test_a_network_inside_another_reward_goes_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = networks([reward := clip(folder)])[0]
    rewards = load_rewards(PerFrame(reward))
    with meta_is_away(monkeypatch) as moves:
        rewards.offload()
        video: Any = IMAGES
        first, second = (rewards([video], load_prompts(["a cat"])).total for _ in range(2))
        assert devices(network) == {"meta"} and moves == ["meta", "cpu", "meta"]
    assert torch.equal(first, second)


def test_in_a_run_they_are_away_while_the_model_works(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    light(monkeypatch)
    trained: list[list[Tensor]] = []
    phases: list[list[tuple[str, set[str]]]] = []
    for offload in (False, True):
        seen: list[tuple[str, set[str]]] = []

        class Noted:
            __name__ = "noted"

            def __init__(self, seen: list[tuple[str, set[str]]]) -> None:
                self.inner, self.seen = clip(folder), seen

            def note(self, phase: str) -> None:
                self.seen.append((phase, devices(networks([self])[0])))

            def __call__(self, images: Any, prompts: Any) -> list[float]:
                self.note("scoring")
                return self.inner(images, prompts)

        reward, pipe = Noted(seen), sd3_small()
        pipe.transformer.register_forward_pre_hook(
            lambda *_, reward=reward: reward.note("sampling or training")
        )
        with meta_is_away(monkeypatch):
            memory = {"offload_rewards": offload}
            made = trainer(tmp_path / str(offload), reward, model=pipe, memory=memory)
            made.train()
        trained.append([p.detach().clone() for p in made.policy.parameters()])
        first = next(place for place, (phase, _) in enumerate(seen) if phase == "scoring")
        phases.append(seen[first:])
    here, there = ({(phase, *where) for phase, where in seen} for seen in phases)
    assert here == {("scoring", "cpu"), ("sampling or training", "cpu")}
    assert there == {("scoring", "cpu"), ("sampling or training", "meta")}
    for one, other in zip(*trained, strict=True):
        torch.testing.assert_close(one, other)
