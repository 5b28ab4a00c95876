"""Rollouts by a server in a process of its own: the same training, or one clear error."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from PIL import Image
from safetensors.torch import load, save, save_file

from dgpo.core.process import Level
from dgpo.errors import UserError
from dgpo.models.pipeline.prompt_encoder import Conditioning
from dgpo.models.pipeline.rollout import Rollout
from dgpo.prompts.caption import Caption
from dgpo.recipe import Recipe
from dgpo.rollouts import RolloutRequest
from dgpo.rollouts.remote import RemoteEngine
from dgpo.rollouts.wire import hash_of, pack, unpack
from families.tiny import sd3_small
from reliable import tensors
from tiny_runs import light, rows, settings, trainer


@pytest.fixture(autouse=True)
def _light(monkeypatch: pytest.MonkeyPatch) -> None:
    light(monkeypatch)


@pytest.fixture
def url(urls: list[str]) -> str:
    return urls[0]


RUN: dict[str, Any] = {
    "train": {"iterations": 2, "lr": 1e-2},
    "rollout": {"batch": 3, "guidance_scale": 2.0, "scheduler": "euler"},
}


def with_engine(url: str, **changes: Any) -> dict[str, Any]:
    return {**RUN, "rollout": {**RUN["rollout"], "engine": url, **changes}}


def test_a_run_with_an_engine_is_the_run_without(url: str, tmp_path: Path) -> None:
    trainer(tmp_path / "here", **RUN).train()
    run = trainer(tmp_path / "there", **with_engine(url))
    run.train()
    for one, two in zip(rows(tmp_path / "here"), rows(tmp_path / "there"), strict=True):
        assert one["reward_mean"] == two["reward_mean"] and one["loss"] == two["loss"]
    here, there = tensors(tmp_path / "here"), tensors(tmp_path / "there")
    assert here.keys() == there.keys()
    assert all(torch.equal(tensor, there[name]) for name, tensor in here.items())
    first, last = rows(tmp_path / "there")
    assert first["reward_mean"] != last["reward_mean"]  # the weights that were sent had changed
    engine: Any = run._collect._engine  # pyright: ignore
    (client,) = engine.clients
    assert client.difference < 1e-5  # of one picture and a batch of three
    lora = sum(p.numel() * 4 for p in run.policy.parameters())
    assert 2 * lora < client.bytes_sent < 2 * (lora + 20_000)
    assert 0 < client.bytes_received < 2 * 8 * (4 * 16 * 16 * 16 + 3 * 16 * 16)


@pytest.mark.slow
def test_the_average_that_samples_is_the_one_that_is_sent(url: str, tmp_path: Path) -> None:
    old = {"switch_to_old_after": 0}
    here = {**RUN, "rollout": {**RUN["rollout"], **old}}
    trainer(tmp_path / "here", **here).train()
    trainer(tmp_path / "there", **with_engine(url, **old)).train()
    one, two = tensors(tmp_path / "here"), tensors(tmp_path / "there")
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_another_model_is_refused(url: str, tmp_path: Path) -> None:
    pipe = sd3_small()
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():
            parameter.mul_(1.7)
    with pytest.raises(UserError, match=r"the first picture differs.*same sampler"):
        trainer(tmp_path, model=pipe, **with_engine(url)).train()


def test_a_wrong_token_and_no_server_are_told(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DGPO_ROLLOUT_TOKEN", "wrong-one")
    with pytest.raises(UserError, match=r"401.*set DGPO_ROLLOUT_TOKEN") as error:
        trainer(tmp_path / "a", **with_engine(url)).train()
    assert "wrong-one" not in str(error.value)
    with pytest.raises(UserError, match=r"no answer.*python -m dgpo.rollouts.server"):
        trainer(tmp_path / "b", **with_engine("http://127.0.0.1:9")).train()


def test_a_server_refuses_what_it_cannot_do_and_goes_on(url: str) -> None:
    ask = {
        "texts": ["a"], "seeds": [1], "steps": 2, "guidance_scale": 1.0, "scheduler": None,
        "call": {"height": 16, "width": 16}, "weights": None,
    }  # fmt: skip
    other = save({"transformer.no.such.layer.lora_A.weight": torch.zeros(2, 2)})
    head = {"Authorization": f"Bearer {os.environ['DGPO_ROLLOUT_TOKEN']}"}
    address = httpx.URL(url)  # connections that say nothing keep nobody out
    idle = [socket.create_connection((address.host, address.port or 0)) for _ in range(70)]
    with httpx.Client(base_url=url, headers=head, timeout=60) as client:
        for data, name in ((b"x", "0" * 64), (b"", "0" * 64), (other, "0" * 64), (other, None)):
            name = name or hash_of(data)
            assert client.put(f"/v1/weights/{name}", content=data).status_code == 422
        assert client.post("/v1/rollout", json={**ask, "weights": "0" * 64}).status_code == 409
        for wrong in (
            {"seeds": [1, 2]}, {"seeds": [-1]}, {"texts": []}, {"steps": 0}, {"scheduler": "eular"},
            {"scheduler": "diffusers:DDIMScheduler"},  # a path would let the asker import anything
            {"call": {"hight": 16}}, {"guidance_scale": "x"}, {"more": 1}, {"call": {"height": 7}},
            {"call": {"height": "x"}}, {"call": {"height": 1e308}}, {"call": {"height": {}}},
        ):  # fmt: skip
            response = client.post("/v1/rollout", json={**ask, **wrong})
            assert response.status_code == 422, (wrong, response.text)
        assert client.post("/v1/rollout", content=b"\x80\x04").status_code == 415
        plain = {"content": b"\x80\x04", "headers": {"Content-Type": "application/json"}}
        assert client.post("/v1/rollout", **plain).status_code == 422
        made = unpack(client.post("/v1/rollout", json=ask).raise_for_status().content, 1)
    assert made.images is not None and made.images[0].size == (16, 16)
    for one in idle:
        one.close()


def test_what_travels_comes_back_bit_for_bit() -> None:
    levels = [Level(torch.tensor(t), s) for t, s in ((1000.0, 1.0), (333.3, 1 / 3))]
    images = [Image.effect_noise((5, 4), 90).convert("RGB") for _ in range(3)]
    made = Rollout(torch.randn(3, 2, 4, 4), images, levels)
    data = pack(made)
    again = unpack(data, 3)
    assert torch.equal(again.x0, made.x0) and again.images is not None
    assert [image.tobytes() for image in again.images] == [image.tobytes() for image in images]
    assert [(float(level.timestep), level.sigma) for level in again.levels] == [
        (float(level.timestep), level.sigma) for level in levels
    ]
    for broken, count in ((data[:-9], 3), (b"", 3), (data, 2), (save({"x0": made.x0}), 3)):
        with pytest.raises(UserError, match="no rollout"):
            unpack(broken, count)


def reordered(data: bytes) -> bytes:
    """The same tensors in a file whose header has another order, as every save may have."""
    size = int.from_bytes(data[:8], "little")
    head = json.dumps(dict(reversed(json.loads(data[8 : 8 + size]).items()))).encode()
    return len(head).to_bytes(8, "little") + head + data[8 + size :]


def test_weights_are_called_by_their_tensors() -> None:
    tensors = {
        "b": torch.randn(3, 2), "a": torch.ones(2, 3, dtype=torch.bfloat16), "c": torch.zeros(()),
    }  # fmt: skip
    data = save(tensors)
    other = reordered(data)
    assert other != data and load(other).keys() == tensors.keys()
    assert hash_of(other) == hash_of(data)
    for name, value in (
        ("b", tensors["b"].nextafter(torch.tensor(9.0))), ("b", tensors["b"].reshape(2, 3)),
        ("a", tensors["a"].half()), ("d", torch.ones(())),
    ):  # fmt: skip
        assert hash_of(save({**tensors, name: value})) != hash_of(data)


class Weights:
    """A policy that is nothing but a file."""

    lora, model = 1, SimpleNamespace(call={}, device="cpu")

    def save(self, folder: str, weights: str) -> None:
        save_file({"a": torch.ones(2)}, Path(folder) / "lora.safetensors")

    @contextmanager
    def rolling(self, weights: str) -> Iterator[None]:
        yield


@pytest.mark.parametrize(
    ("told", "used", "words"),
    [
        (b'{"weights": "HASH"}', "HASH", None),
        (b'{"weights": "0000"}', "HASH", "it has the weights '0000'"),
        (b"{}", "HASH", "does not say which weights"),
        (b"ok", "HASH", "does not say which weights"),
        (b'{"weights": "HASH"}', "00" * 32, "were made with the LoRA 000000000000"),
        (b'{"weights": "HASH"}', None, "were made with no LoRA"),
    ],
)
def test_a_server_with_other_weights_is_refused(
    told: bytes, used: str | None, words: str | None
) -> None:
    name = hash_of(save({"a": torch.ones(2)}))
    made = Rollout(torch.ones(1, 2), [Image.new("RGB", (2, 2))], [Level(torch.tensor(1.0), 1.0)])

    def answer(request: httpx.Request) -> httpx.Response:
        if request.method == "PUT":
            return httpx.Response(200, content=told.replace(b"HASH", name.encode()))
        return httpx.Response(200, content=pack(made, used and used.replace("HASH", name)))

    policy: Any = Weights()
    engine = RemoteEngine(policy, "http://engine")
    (client,) = engine.clients
    client.client = httpx.Client(transport=httpx.MockTransport(answer), base_url="http://engine")
    client.checked = True  # with the policy's own pictures, of which there are none here

    def ask() -> None:
        with engine.holding("policy"):
            engine.rollout(RolloutRequest(["a"], Conditioning({}, 1), [0], steps=1))

    if words is None:
        return ask()
    with pytest.raises(UserError, match=words):
        ask()


def test_prompts_with_pictures_do_not_travel() -> None:
    policy: Any = SimpleNamespace(lora=1)
    texts = ["a", Caption("make it blue", {"image": Image.new("RGB", (2, 2))})]
    request = RolloutRequest(texts, Conditioning({}, 2), [0, 1], steps=2)
    with pytest.raises(UserError, match="pictures of prompt rows"):
        RemoteEngine(policy, "http://127.0.0.1:9").rollout(request)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"algorithm": "flow_grpo"}, "needs the steps"),
        ({"memory": {"vae_precision": "float32"}}, "its own autoencoder"),
        ({"lora": None}, "a LoRA"),
        ({"rollout": {"sde": {"kind": "flow"}}}, "rollout.sde"),
        ({"rollout": {"engine": "me:pw@host"}}, "without a password"),
        ({"rollout": {"engine": "http://me:pw@host"}}, "without a password"),
        ({"rollout": {"engine": "10.0.0.1:80"}}, "should be an address"),
    ],
)
def test_what_an_engine_cannot_do_is_refused_at_once(changes: dict[str, Any], words: str) -> None:
    given = {key: value for key, value in changes.items() if key != "rollout"}
    rollout = {"engine": "http://10.0.0.1:8770", **changes.get("rollout", {})}
    with pytest.raises(UserError, match=words) as error:
        Recipe.from_dict({**settings(**given), "rollout": {"steps": 10, **rollout}})
    assert "pw" not in str(error.value)
