"""Several servers divide the rollouts; they fail, come back, and work beside the training."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from dgpo.errors import UserError
from dgpo.rewards.call_limits import Again
from dgpo.rollouts import RolloutRequest, clients, remote
from dgpo.rollouts.server import Joined, Sampler
from dgpo.rollouts.wire import Ask
from families.tiny import sd3_small
from reliable import reliable, stopping, tensors
from tiny_runs import light, rows, trainer

RUN: dict[str, Any] = {
    "train": {"iterations": 3, "lr": 1e-2},
    "rollout": {"batch": 2, "guidance_scale": 2.0, "scheduler": "euler"},
}


@pytest.fixture(autouse=True)
def _light(monkeypatch: pytest.MonkeyPatch) -> None:
    light(monkeypatch)


class Asked:
    """What passes to the servers: counted, and through ``before``."""

    def __init__(self, urls: list[str]) -> None:
        self.urls = urls
        self.by: dict[str, list[str]] = {url: [] for url in urls}
        self.before: Callable[[str, str], httpx.Response | None] = lambda url, path: None

    def count(self, url: str, what: str) -> int:
        return self.by[url].count(what)

    def settings(self, **changes: Any) -> dict[str, Any]:
        return {**RUN, "rollout": {**RUN["rollout"], "engine": self.urls, **changes}}


@pytest.fixture
def asked(urls: list[str], monkeypatch: pytest.MonkeyPatch) -> Asked:
    made, send = Asked(urls), clients.send

    def through(client: httpx.Client, method: str, path: str, **body: Any) -> httpx.Response:
        url = str(client.base_url).rstrip("/")
        made.by[url].append(path.split("/")[2] if method != "GET" else path)
        return made.before(url, path) or send(client, method, path, **body)

    monkeypatch.setattr(clients, "send", through)
    return made


def assert_same_run(one: Path, two: Path) -> None:
    """The same samples and updates but for rounding: a decoder in another process may round one
    number of a picture to its neighbour, and Adam makes whole steps of small gradients. Samples of
    the weights of another iteration differ by 3e-4."""
    for here, there in zip(rows(one), rows(two), strict=True):
        assert here["reward_mean"] == pytest.approx(there["reward_mean"], rel=1e-5)
    here, there = tensors(one), tensors(two)
    assert here.keys() == there.keys()
    ups = [name for name in here if name.startswith("policy.") and "lora_B" in name]  # 0 at first
    mine, other = (torch.cat([made[name].flatten() for name in ups]) for made in (here, there))
    assert float((mine - other).norm()) < 0.05 * float(mine.norm()) > 0


def test_servers_divide_the_batches_and_change_nothing(asked: Asked, tmp_path: Path) -> None:
    trainer(tmp_path / "here", **RUN).train()
    met = threading.Barrier(2)  # each waits for the other: both are at work at the same time

    def together(url: str, path: str) -> None:
        if path == "/v1/rollout":
            met.wait(20)

    asked.before = together
    trainer(tmp_path / "there", **asked.settings()).train()
    assert_same_run(tmp_path / "here", tmp_path / "there")
    for url in asked.urls:
        assert asked.count(url, "rollout") == 6 and asked.count(url, "weights") == 3


def test_without_a_batch_each_server_has_its_share(
    asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample, seen = clients.Server.sample, []

    def counted(self: Any, request: RolloutRequest, weights: Any) -> Any:
        seen.append(len(request.seeds))
        return sample(self, request, weights)

    monkeypatch.setattr(clients.Server, "sample", counted)
    trainer(tmp_path, **asked.settings(batch=None)).train()
    assert seen == [4] * 6  # of 8 pictures


def test_servers_work_while_the_policy_is_trained(
    asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead = {**RUN, "rollout": {**RUN["rollout"], "ahead": 1}}
    trainer(tmp_path / "here", **ahead).train()
    run = trainer(tmp_path / "there", **asked.settings(ahead=1))
    trained, answered = threading.Event(), threading.Event()
    update = run.updater.update

    def slow(*given: Any) -> Any:
        # the third iteration's pictures are asked for before the second is trained
        if run.iteration == 1:
            assert answered.wait(20)
        trained.set()
        return update(*given)

    def before(url: str, path: str) -> None:
        if threading.current_thread().name == "rollouts" and run.iteration == 1:
            answered.set()

    monkeypatch.setattr(run.updater, "update", slow)
    asked.before = before
    run.train()
    assert_same_run(tmp_path / "here", tmp_path / "there")
    hidden = [row["seconds_rollout_hidden"] for row in rows(tmp_path / "there")]
    assert hidden[0] == 0 and min(hidden[1:]) > 0


def test_a_run_with_servers_that_work_ahead_goes_on_where_it_was(
    asked: Asked, tmp_path: Path
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    changes = asked.settings(ahead=1, steps=3, call={"height": 16, "width": 16})
    changes["train"] = {"iterations": 4, "lr": 1e-2}
    reliable(tmp_path / "whole", **changes).train()
    with pytest.raises(KeyboardInterrupt):
        reliable(tmp_path / "halves", reward=stopping(2, interrupt), **changes).train()
    run = reliable(tmp_path / "halves", resume=True, **changes)
    assert 0 < run.iteration < 4
    run.train()
    assert_same_run(tmp_path / "whole", tmp_path / "halves")


def test_a_server_that_fails_gives_its_batch_to_another(
    asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer(tmp_path / "here", **RUN).train()
    monkeypatch.setattr(remote, "PATIENCE", 0.1)
    one, two = asked.urls

    def dies(url: str, path: str) -> None:
        if url == two and asked.count(url, "rollout") > 2:
            raise Again("gone", gone=True)

    asked.before = dies
    trainer(tmp_path / "there", **asked.settings()).train()
    assert_same_run(tmp_path / "here", tmp_path / "there")
    assert asked.count(one, "rollout") >= 8


def test_a_server_that_was_started_anew_gets_the_weights_again(
    asked: Asked, tmp_path: Path
) -> None:
    trainer(tmp_path / "here", **RUN).train()
    url, anew = asked.urls[0], []

    def restart(url: str, path: str) -> Any:
        if path == "/v1/rollout" and asked.count(url, "rollout") == 6 and not anew:
            anew.append(url)
            return httpx.Response(409, request=httpx.Request("POST", url))
        return None

    asked.before = restart
    trainer(tmp_path / "there", **asked.settings(engine=url)).train()
    assert anew and asked.count(url, "weights") == 4
    assert_same_run(tmp_path / "here", tmp_path / "there")


def test_when_all_are_gone_each_is_named(
    asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "PATIENCE", 0.3)

    def dies(url: str, path: str) -> None:
        if asked.count(url, "rollout") > 2:
            raise Again("gone", gone=True)

    asked.before = dies
    with pytest.raises(UserError) as error:
        trainer(tmp_path, **asked.settings()).train()
    assert str(error.value).count("gone; start it with: python -m dgpo.rollouts.server") == 2
    assert all(url in str(error.value) for url in asked.urls)


def test_requests_that_wait_are_one_batch() -> None:
    sampler, sizes = Sampler(sd3_small()), []
    call = {"height": 16, "width": 16}
    first, began, go = threading.Event(), threading.Event(), threading.Event()

    def sample(ask: Ask) -> Any:
        sizes.append(len(ask.seeds))
        if not first.is_set():
            first.set()
            began.set()
            assert go.wait(20)
        return sampler.sample(ask)

    def ask(seeds: list[int], **changes: Any) -> Ask:
        given = {"steps": 2, "guidance_scale": 1.0, "scheduler": None, "call": call}
        texts = [f"a cat {seed}" for seed in seeds]
        return Ask(texts=texts, seeds=seeds, weights=None, **{**given, **changes})

    asks = [ask([1]), ask([2, 3]), ask([4]), ask([5], steps=3), ask([6, 7, 8]), ask([9, 9])]
    asks[-1].texts.pop()
    joined = Joined(sample, rows=4)
    with ThreadPoolExecutor(8) as pool:
        made = [pool.submit(joined, asks[0])]
        assert began.wait(20)
        made += [pool.submit(joined, one) for one in asks[1:]]
        while len(joined._waiting) < 5:
            pass
        go.set()
        answers: list[Any] = [one.exception() or one.result() for one in made]
    # 1 alone; 2 + 1 together, and 3 more would be too many; another number of steps; a bad one
    assert sorted(sizes) == [1, 1, 2, 2, 3, 3] or sorted(sizes) == [1, 1, 2, 2, 4, 2]
    assert isinstance(answers[-1], UserError) and "2 seeds for 1 texts" in str(answers[-1])
    for one, got in zip(asks[:-1], answers[:-1], strict=True):
        alone = sampler.sample(one)
        torch.testing.assert_close(got.x0, alone.x0, rtol=1e-4, atol=1e-4)
        assert len(got.images) == len(one.seeds)
