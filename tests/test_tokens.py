"""Tokens of clients: white space around them is no part of them, what cannot be one is told by its
name, and whatever fails repeats none of them."""

from __future__ import annotations

import json
import logging
import socket
import struct
import threading
import traceback
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from PIL import Image
from typer.testing import CliRunner

from dgpo.cli import app
from dgpo.errors import UserError
from dgpo.prompts import Prompt
from dgpo.ranking.server import PageServer
from dgpo.rewards import load_rewards
from dgpo.rewards.reward import RewardFailure
from dgpo.rewards.shipped.http import HttpReward
from dgpo.rewards.shipped.vlm_judge import VLMJudge
from dgpo.rollouts import RolloutRequest
from dgpo.rollouts.clients import Weights
from dgpo.rollouts.remote import RemoteEngine
from dgpo.serve.access import token_for

TOKEN = "sesame-0123456789"
PICTURES = [Image.new("RGB", (2, 2), "red")]


def ask_judge(url: str) -> Any:
    return VLMJudge(f"{url}/v1", "m", retries=1, pause=0, timeout=5)(PICTURES, ["a"])


def ask_rewards(url: str) -> Any:
    options = {"url": url, "reward": "redness", "retries": 1, "pause": 0, "timeout": 5}
    return load_rewards({"http": {"options": options}})(PICTURES, [Prompt("a")])


def check_rewards(url: str) -> Any:
    HttpReward(url, "nothing", retries=1, pause=0, timeout=5).check([])


def engine(url: str) -> RemoteEngine:
    policy: Any = SimpleNamespace(lora=object(), model=SimpleNamespace(call={}))
    return RemoteEngine(policy, url, timeout=5)


def ask_engine(url: str) -> Any:
    return send_weights(url, "0" * 64)


def send_weights(url: str, there: str | None = None) -> Any:
    made = engine(url)
    made._weights = Weights("0" * 64, Path(__file__))
    made.clients[0].has = there
    return made.rollout(RolloutRequest(["a"], None, [1], 1))  # pyright: ignore


CLIENTS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "judge": ("DGPO_JUDGE_KEY", ask_judge),
    "rewards": ("DGPO_REWARD_TOKEN", ask_rewards),
    "check": ("DGPO_REWARD_TOKEN", check_rewards),
    "engine": ("DGPO_ROLLOUT_TOKEN", ask_engine),
    "weights": ("DGPO_ROLLOUT_TOKEN", send_weights),
}


class Echo(BaseHTTPRequestHandler):
    """Repeats the token in every answer, as a careless proxy may."""

    mode: Any = 200
    heard: ClassVar[list[str]] = []

    def answer(self) -> None:
        got = self.headers.get("Authorization", "none")
        self.heard.append(got)
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.mode == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return self.connection.close()
        if self.mode == "cut":
            self.wfile.write(f"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n{got}".encode())
            return None
        if self.mode == "garbage":
            self.wfile.write(f"{got} is no HTTP\r\n\r\n".encode())
            return None
        chat = [{"message": {"content": f"Score: 99 {got}"}}]
        said: Any = {"detail": got, "rewards": [got], "scores": {got: [got]}, "weights": got}
        body = json.dumps({**said, "choices": chat} if self.mode != "text" else got).encode()
        self.send_response(self.mode if isinstance(self.mode, int) else 200)
        self.send_header("Location", "http://127.0.0.1:9/")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_PUT = answer

    def log_message(self, format: str, *args: Any) -> None: ...


@pytest.fixture(scope="module")
def echo() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Echo)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def seen(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> Callable[[BaseException], str]:
    """All that anybody could read of a failure."""
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.INFO, "httpcore")  # below, it quotes whatever a server says

    def texts(error: BaseException) -> str:
        printed = capfd.readouterr()
        told = "".join(traceback.format_exception(error))
        return f"{told}{error!r}{printed.out}{printed.err}{caplog.text}"

    return texts


MODES = [200, "text", 302, 401, 403, 404, 422, 429, 500, 503, "reset", "cut", "garbage", "nobody"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("client", CLIENTS)
def test_whatever_fails_repeats_no_token(
    client: str,
    mode: Any,
    echo: str,
    monkeypatch: pytest.MonkeyPatch,
    seen: Callable[[BaseException], str],
) -> None:
    variable, call = CLIENTS[client]
    monkeypatch.setenv(variable, f" \t{TOKEN}\r\n")
    monkeypatch.setattr(Echo, "mode", mode)
    Echo.heard.clear()
    with pytest.raises((UserError, RewardFailure)) as error:
        call("http://127.0.0.1:9" if mode == "nobody" else echo)
    assert set(Echo.heard) == (set() if mode == "nobody" else {f"Bearer {TOKEN}"})
    assert TOKEN not in seen(error.value)


BAD = {
    "a line break inside": f"{TOKEN}\nX-Other: 1",
    "two words": f"{TOKEN} {TOKEN}",
    "not ASCII": f"é{TOKEN}",
    "a dash of a word processor": f"{TOKEN}\u2013x",
    "a control character": f"{TOKEN}\x01",
    "a deleted one": f"{TOKEN}\x7f",
    "a tab inside": f"{TOKEN}\t{TOKEN}",
    "bytes that are no text": f"\udcff{TOKEN}",
    "nothing": "",
    "white space alone": " \n",
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("client", CLIENTS)
def test_what_cannot_be_a_token_is_told_by_its_name(
    client: str,
    bad: str,
    echo: str,
    monkeypatch: pytest.MonkeyPatch,
    seen: Callable[[BaseException], str],
) -> None:
    variable, call = CLIENTS[client]
    monkeypatch.setenv(variable, BAD[bad])
    Echo.heard.clear()
    with pytest.raises(UserError, match=rf"^{variable} should hold one word") as error:
        call(echo)
    assert not Echo.heard and TOKEN not in seen(error.value)


@pytest.mark.parametrize("bad", BAD)
def test_files_and_options_that_hold_no_token(
    bad: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: Callable[[BaseException], str]
) -> None:
    file = tmp_path / "token"
    file.write_bytes(BAD[bad].encode("utf-8", "surrogateescape"))
    for call in (
        lambda: token_for("0.0.0.0", file),
        lambda: PageServer(port=0, token_file=file),
        lambda: HttpReward("http://127.0.0.1:9", token_file=str(file)).check([]),
    ):
        with pytest.raises(UserError, match=r"^token file .* should hold one word") as error:
            call()
        assert TOKEN not in seen(error.value)
    with pytest.raises(UserError, match=r"option key .*should hold one word") as error:
        VLMJudge("http://127.0.0.1:9", "m", key=BAD[bad]).check([])
    assert TOKEN not in seen(error.value)


def test_a_file_with_the_mark_of_windows_and_white_space_is_fine(tmp_path: Path) -> None:
    (tmp_path / "token").write_bytes(b"\xef\xbb\xbf" + f"  {TOKEN}\r\n\r\n".encode())
    assert token_for("0.0.0.0", tmp_path / "token") == TOKEN


@pytest.mark.parametrize("value", [f" {TOKEN}\n", f"{TOKEN}\n{TOKEN}", f"é{TOKEN}", ""])
@pytest.mark.parametrize("reward", ["http", "vlm_judge"])
def test_a_command_repeats_no_token(
    reward: str, value: str, echo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Echo, "mode", 500)
    for kind, name in (("REWARD", "NAME"), ("JUDGE", "MODEL")):
        monkeypatch.setenv(f"DGPO_{kind}_URL", echo)
        monkeypatch.setenv(f"DGPO_{kind}_{name}", "m")
    monkeypatch.setenv("DGPO_REWARD_TOKEN", value)
    monkeypatch.setenv("DGPO_JUDGE_KEY", value)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between tries
    PICTURES[0].save(tmp_path / "a.png")
    (tmp_path / "p.txt").write_text("a\n")
    common = ["score", "--images", str(tmp_path), "--prompts", str(tmp_path / "p.txt")]
    done = CliRunner().invoke(app, [*common, "--reward", reward])
    assert done.exit_code == 2 and isinstance(done.exception, SystemExit), done.exception
    assert TOKEN not in done.output + done.stderr and "Traceback" not in done.stderr
    said = "status 500" if value.startswith(" ") else "should hold one word"
    assert said in done.stderr
