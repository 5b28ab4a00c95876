"""The rollout server and the ranking page asked anything: an answer or a refusal, never a 500."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from typing import Any
from urllib.parse import quote

import pytest
from fastapi.testclient import TestClient
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save
from torch import zeros

from dgpo.ranking import app as ranking
from dgpo.ranking.desk import Desk
from dgpo.ranking.store import Group, Store
from dgpo.rewards.call_limits import in_thread
from dgpo.rollouts import server as rollouts
from dgpo.rollouts.wire import hash_of
from families.tiny import sd3_small
from fuzz.parts import PROFILE, VALUES, changed_bytes

SECONDS = 60
"""An answer that takes longer is a hang."""
JSON = {"Content-Type": "application/json"}
RAW = [
    b"", b"null", b"[]", b"[" * 50_000, b'{"a":' * 50_000, b"\xff\xfe{}", b'"\\ud800"', b"NaN",
    b'{"rater": "\\ud800", "answer": {"kind": "\\udfff"}, "seconds": -Infinity}',
    b'{"rater": "a", "answer": {"kind": "skip"}, "seconds": ' + b"9" * 5000 + b"}",
    b'{"texts": ["\\ud800"], "seeds": [1e999], "steps": ' + b"9" * 5000 + b"}",
]  # fmt: skip
"""Bodies that are no JSON, or JSON that Python cannot write."""


def said(client: TestClient, method: str, url: str, body: bytes, **headers: str) -> Any:
    """The answer, which explains itself if it is a refusal."""
    call = partial(client.request, method, url, content=body, headers={**JSON, **headers})
    answer = in_thread(call).result(SECONDS)
    assert answer.status_code == 200 or 400 <= answer.status_code < 500, answer.text
    if answer.status_code != 200:
        detail = answer.json()["detail"]
        assert isinstance(detail, str) and 5 < len(detail) < 2000, detail
    return answer


def changed(good: dict[str, Any], **odd: st.SearchStrategy) -> st.SearchStrategy[bytes]:
    """Bodies with keys that are lost, odd, or more than there should be."""
    keys = {key: st.just(value) | odd.get(key, VALUES) for key, value in good.items()}
    made = st.fixed_dictionaries(keys) | st.fixed_dictionaries({}, optional=keys)
    more = st.just({}) | st.dictionaries(st.text(max_size=8), VALUES, max_size=2)
    whole = st.tuples(made, more).map(lambda parts: {**parts[0], **parts[1]}) | VALUES
    return whole.map(lambda body: json.dumps(body).encode())


@pytest.fixture(scope="module")
def engine() -> Iterator[TestClient]:
    with TestClient(
        rollouts.make_app(sd3_small()), "http://127.0.0.1", raise_server_exceptions=False
    ) as client:
        yield client


ASK = {
    "texts": ["a"], "seeds": [1], "steps": 1, "guidance_scale": 1.0, "scheduler": None,
    "call": {"height": 16, "width": 16}, "weights": None,
}  # fmt: skip


def _cheap(value: Any) -> bool:
    """Whether a number asks for no picture that takes minutes."""
    return not isinstance(value, int | float) or not 32 < abs(value) < 10**6


NUMBERS = VALUES.filter(_cheap)
CALLS = st.fixed_dictionaries(
    {"height": st.just(16) | NUMBERS, "width": st.just(16) | NUMBERS},
    optional={
        "max_sequence_length": NUMBERS, "negative_prompt": VALUES, "clip_skip": NUMBERS,
        "joint_attention_kwargs": VALUES, "mu": NUMBERS, "prompt_embeds": VALUES,
        "ip_adapter_image": VALUES, "output_type": VALUES,
    },
)  # fmt: skip


@PROFILE
@given(body=changed(ASK, steps=NUMBERS, call=VALUES | CALLS) | st.sampled_from(RAW))
@example(body=json.dumps({**ASK, "call": {"height": "x"}}).encode())
@example(body=json.dumps({**ASK, "guidance_scale": 1e308}).encode())
def test_rollouts(engine: TestClient, body: bytes) -> None:
    said(engine, "POST", "/v1/rollout", body)


@PROFILE
@given(call=CALLS)
def test_calls_of_the_pipeline(engine: TestClient, call: dict[str, Any]) -> None:
    said(engine, "POST", "/v1/rollout", json.dumps({**ASK, "call": call}).encode())
    assert said(engine, "POST", "/v1/rollout", json.dumps(ASK).encode()).status_code == 200


LORA = save({"transformer.proj_out.lora_A.weight": zeros(2, 2)})


@PROFILE
@given(data=changed_bytes(LORA) | st.binary(max_size=100), name=st.none() | st.text(max_size=70))
def test_weights(engine: TestClient, data: bytes, name: str | None) -> None:
    if name is None:
        try:
            name = hash_of(data)
        except ValueError:
            name = "0" * 64
    said(engine, "PUT", f"/v1/weights/{quote(name, '')}", data)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TestClient, Group]]:
    desk = Desk(Store(tmp_path_factory.mktemp("ranking")))
    group = desk.post("a cat", [Image.new("RGB", (2, 2), (n, 0, 0)) for n in range(3)])
    app = ranking.make_app(desk)
    with TestClient(app, "http://127.0.0.1", raise_server_exceptions=False) as client:
        yield client, group


ANSWERS = VALUES | st.fixed_dictionaries(
    {"kind": st.sampled_from(["likes", "order", "stars", "skip"]) | VALUES},
    optional={
        key: VALUES | st.lists(st.integers(-1, 6), max_size=4)
        for key in ("liked", "best_first", "stars")
    },
)
SAID = {"rater": "ann", "answer": {"kind": "skip"}, "seconds": 1.5}


@PROFILE
@given(body=changed(SAID, answer=ANSWERS) | st.sampled_from(RAW))
@example(body=json.dumps({**SAID, "seconds": float("nan")}).encode())
@example(body=json.dumps({**SAID, "seconds": float("-inf")}).encode())
def test_answers(page: tuple[TestClient, Group], body: bytes) -> None:
    client, group = page
    said(client, "POST", f"/v1/groups/{group.id}", body)


@PROFILE
@given(rater=st.text(max_size=50), id=st.text(max_size=40), place=st.integers() | st.text())
def test_addresses(page: tuple[TestClient, Group], rater: str, id: str, place: Any) -> None:
    client, group = page
    for path in ("groups", "last"):
        answer = client.get(f"/v1/{path}", params={"rater": rater})
        assert answer.status_code in (200, 404, 422), answer.text
    for one in (id, group.id):
        answer = client.get(f"/v1/groups/{quote(one, '')}/{quote(str(place), '')}.png")
        assert answer.status_code in (200, 404, 422), answer.text
