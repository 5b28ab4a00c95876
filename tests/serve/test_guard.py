"""What the three servers refuse alike; and strangers cannot keep others from being answered."""

from __future__ import annotations

import io
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from dgpo.ranking import app as ranking
from dgpo.ranking.desk import Desk
from dgpo.ranking.store import Store
from dgpo.rewards import load_rewards
from dgpo.rollouts import server as rollouts
from dgpo.serve import app as rewards
from dgpo.serve import guard
from serving import serving

TOKEN = "correct-horse"
PATIENCE = 60
"""Seconds after which a test gives up; what it waits for takes less than one."""


def made(name: str, folder: Path, token: str | None = None) -> Any:
    if name == "rewards":
        return rewards.make_app([load_rewards(["redness"])], token)
    if name == "rollouts":
        return rollouts.make_app(object(), token)
    return ranking.make_app(Desk(Store(folder)), token=token)


def question(name: str) -> dict[str, Any]:
    """A request that is understood, whether or not it can be answered."""
    if name == "rewards":
        buffer = io.BytesIO()
        Image.new("RGB", (2, 2), "red").save(buffer, "PNG")
        form = {"request": json.dumps({"prompts": ["a"]})}
        files = [("images", ("0.png", buffer.getvalue(), "image/png"))]
        return {"url": "/v1/score", "data": form, "files": files}
    if name == "rollouts":
        asked = {"texts": ["a"], "seeds": [], "steps": 1, "guidance_scale": 1, "scheduler": None}
        return {"url": "/v1/rollout", "json": {**asked, "call": {}, "weights": None}}
    said = {"rater": "ann", "answer": {"kind": "skip"}}
    return {"url": f"/v1/groups/{'0' * 32}", "json": said}


SERVERS = {"rewards": 200, "rollouts": 422, "ranking": 404}
"""The servers, and how each answers its question."""
FORMS = ["text/plain", "application/x-www-form-urlencoded", "image/png", ""]


@pytest.mark.parametrize("name", SERVERS)
def test_without_a_token_no_page_of_elsewhere_is_answered(name: str, tmp_path: Path) -> None:
    right, asked = SERVERS[name], question(name)
    with TestClient(made(name, tmp_path), "http://127.0.0.1:8765") as client:
        assert client.post(**asked).status_code == right
        for host in ("localhost:8765", "127.0.0.1", "[::1]:9"):
            assert client.post(**asked, headers={"Host": host}).status_code == right, host
        for host in ("evil.example", "evil.example:8765", "127.0.0.1.evil.example", "", "["):
            answer = client.post(**asked, headers={"Host": host})
            assert answer.status_code == 403, host
            assert "127.0.0.1 or localhost" in answer.json()["detail"]
        for origin in ("http://127.0.0.1:8765", "HTTP://127.0.0.1:8765"):
            assert client.post(**asked, headers={"Origin": origin}).status_code == right, origin
        for origin in ("http://evil.example", "null", "http://127.0.0.1:3000", "http://localhost"):
            answer = client.post(**asked, headers={"Origin": origin})
            assert answer.status_code == 403 and origin in answer.json()["detail"], origin
            assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("name", SERVERS)
def test_with_a_token_whoever_knows_it_may_ask_from_anywhere(name: str, tmp_path: Path) -> None:
    elsewhere = {"Host": "gpu1:8765", "Origin": "https://proxy.example"}
    with TestClient(made(name, tmp_path, TOKEN), "http://127.0.0.1") as client:
        for token in ("", "Bearer wrong", f"bearer {TOKEN}", f"Bearer {TOKEN}x", TOKEN):
            headers = {**elsewhere, "Authorization": token}
            answer = client.post(**question(name), headers=headers)
            assert answer.status_code == 401 and TOKEN not in answer.text
        headers = {**elsewhere, "Authorization": f"Bearer {TOKEN}"}
        assert client.post(**question(name), headers=headers).status_code == SERVERS[name]


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("name", SERVERS)
def test_what_a_page_may_post_without_asking_is_no_question(
    name: str, kind: str, tmp_path: Path
) -> None:
    right = {"rewards": "multipart/form-data"}.get(name, "application/json")
    url = question(name)["url"]
    with TestClient(made(name, tmp_path), "http://127.0.0.1") as client:
        answer = client.post(url, content=b"{}", headers={"Content-Type": kind})
    assert answer.status_code == 415 and f"send {right}" in answer.json()["detail"]


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    with serving(made("rewards", tmp_path)) as address:
        yield address


def opened(url: str, sent: bytes = b"") -> socket.socket:
    place = urlsplit(url)
    made = socket.create_connection((place.hostname or "", place.port or 0), timeout=PATIENCE)
    made.sendall(sent)
    return made


def healthy(url: str) -> bool:
    return httpx.get(f"{url}/health", timeout=PATIENCE).status_code == 200


def test_connections_that_say_nothing_keep_nobody_out(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    idle = [opened(url) for _ in range(70)]
    assert healthy(url) and httpx.get(f"{url}/v1/rewards").status_code == 200
    monkeypatch.setattr(guard, "CONNECTIONS", 80)
    idle += [opened(url) for _ in range(70)]
    assert healthy(url)
    assert idle[0].recv(1) == b""  # the one that waited longest made room
    idle[-1].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert idle[-1].recv(15) == b"HTTP/1.1 200 OK"
    for one in idle:
        one.close()


HEAD = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"


@pytest.mark.parametrize("first", [b"", HEAD, HEAD + b"\r\n" + HEAD])
def test_a_head_that_does_not_end_ends_the_connection(
    first: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "HEAD", 0.3)
    with serving(made("rewards", tmp_path)) as url:
        slow = opened(url, first)
        slow.settimeout(0.02)
        got = b""
        for _ in range(PATIENCE * 50):
            try:
                slow.sendall(b"X")  # a byte now and then, within the name of a header
                data = slow.recv(1000)
            except TimeoutError:
                continue
            except ConnectionError:
                break
            if not data:
                break
            got += data
        else:
            pytest.fail("the connection is still there")
        assert (b"200 OK" in got) is (b"\r\n\r\n" in first)
        assert healthy(url)


POST = (
    b"POST /v1/score HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n"
    b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
)


def test_a_body_that_does_not_come_is_not_waited_for(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "BODY", 0.3)
    slow = opened(url, POST)
    answer = b"".join(iter(lambda: slow.recv(1000), b""))
    assert answer.startswith(b"HTTP/1.1 408") and b"the body is too slow: 5 bytes came" in answer


def test_a_busy_server_says_so_and_is_healthy(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "REQUESTS", 2)
    busy = [opened(url, POST) for _ in range(2)]
    answer = asked_until(url, 503)
    assert answer.headers["Retry-After"] == "1" and healthy(url)
    for one in busy:
        one.close()
    asked_until(url, 200)


def asked_until(url: str, status: int) -> httpx.Response:
    """The first answer of this status."""
    every = (httpx.get(f"{url}/v1/rewards") for _ in range(PATIENCE * 50))
    return next(answer for answer in every if answer.status_code == status)
