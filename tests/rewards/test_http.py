"""`dgpo serve` and its client, over a real socket; what strangers may send; a server that dies."""

import io
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import dgpo.cli.serve
from dgpo import Callback
from dgpo.errors import UserError
from dgpo.prompts import Prompt
from dgpo.rewards import load_rewards
from dgpo.rewards.shipped.http import HttpReward
from dgpo.rewards.shipped.stand_in import redness
from dgpo.rewards.shipped.video import PerFrame
from rewards.tiny import pictures
from serving import serving

pytest.importorskip("fastapi")
import uvicorn

from dgpo.serve.app import Limits, make_app
from dgpo.serve.guard import Connection

TOKEN = "correct-horse"
REDS = [Image.new("RGB", (8, 8), (red, 10, 0)) for red in range(0, 250, 10)]
SIZES: list[int] = []


def counted(images, prompts, k=None):
    SIZES.append(len(images))
    if "slow" in prompts:
        time.sleep(1.5)
    if "broken" in prompts:
        raise RuntimeError("out of memory")
    return [float(value) if value is not None else 0.5 for value in k or [None] * len(images)]


class Picky:
    __name__ = "picky"

    def check(self, prompts):
        if any("text" not in prompt.metadata for prompt in prompts):
            raise UserError("a row has no text")

    def __call__(self, images, prompts, text):
        return [float(len(one)) for one in text]


@contextmanager
def served(*rewards, **limits):
    sets = [load_rewards([one]) for one in rewards]
    app = make_app(sets, TOKEN, Limits(**limits), batch=16, linger=0.05, waiting=20)
    with serving(app) as address:
        yield address


@pytest.fixture(scope="module")
def url():
    limits = {"body": 200_000, "images": 8, "pixels": 10_000, "seconds": 0.7}
    with served(redness, counted, Picky(), **limits) as address:
        yield address


@pytest.fixture
def client(url):
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {TOKEN}"}) as made:
        yield made


@pytest.fixture(autouse=True)
def token(monkeypatch):
    monkeypatch.setenv("DGPO_REWARD_TOKEN", TOKEN)


def picture(kind="PNG", size=(8, 8), **options):
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, kind, **options)
    return buffer.getvalue()


def ask(client, pictures, **question):
    question = {"prompts": ["a"] * len(pictures), "rewards": ["redness"], **question}
    files = [("images", ("x", one)) for one in pictures]
    return client.post("/v1/score", data={"request": json.dumps(question)}, files=files)


def test_scores_are_the_very_numbers_of_the_reward(url, client):
    far = load_rewards({"http": {"options": {"url": url, "reward": "redness", "batch": 3}}})
    rows = [Prompt("a", {"k": 1})] * len(REDS)
    far.check(rows)
    near = load_rewards(["redness"])(REDS, rows).total
    assert far(REDS, rows).total.tolist() == near.tolist()
    webp = ask(client, [picture("WEBP", lossless=True), picture("WEBP"), picture()]).json()
    assert webp["scores"]["redness"] == pytest.approx([1.0, 1.0, 1.0], abs=0.02)
    both = ask(client, [picture()], rewards=["redness", "counted"], metadata=[{"k": 7}]).json()
    assert both == {"scores": {"redness": [1.0], "counted": [7.0]}}


@pytest.mark.parametrize(
    ("limits", "most"),
    [({"images": 3}, 3), ({"pixels": 5 * 256}, 5), ({"body": 6000}, 4), ({}, 16)],
)
def test_requests_are_cut_to_what_the_server_takes(limits, most):
    noise = pictures(20, (16, 16))
    notes = ["x" * (100 * (row % 3)) for row in range(20)]
    asked = []

    def near(images, prompts, note):
        return [
            image.getpixel((3, 3))[0] + len(text) for image, text in zip(images, note, strict=True)
        ]

    with served(near, **limits) as url:
        reward = HttpReward(url, connections=1)
        score = reward._score
        reward._score = lambda files, *rest: asked.append(len(files)) or score(files, *rest)
        assert reward(noise, ["a"] * 20, note=notes) == near(noise, None, notes)
    assert sum(asked) == 20 and max(asked) <= most and len(asked) <= -(-20 // most) + 3


def body_of(bytes_, files=1):
    """A request of exactly so many bytes, and its headers."""
    rest = b"".join(
        b'--x\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\n'
        + picture(size=(1, 1))
        + b"\r\n"
        for _ in range(files)
    )
    rest += b'--x\r\nContent-Disposition: form-data; name="request"\r\n\r\n%b\r\n--x--\r\n'
    asked = {"prompts": [""] * files, "rewards": ["redness"]}
    asked["prompts"][0] = "a" * (bytes_ - len(rest) + 2 - len(json.dumps(asked)))
    head = {"Content-Type": "multipart/form-data; boundary=x"}
    return {"content": rest.replace(b"%b", json.dumps(asked).encode()), "headers": head}


def test_what_is_announced_is_taken_and_one_more_is_not():
    head = {"Authorization": f"Bearer {TOKEN}"}
    limits = {"images": 2000, "body": 8 * 2**20, "pixels": 4096}
    with served(redness, **limits) as url, httpx.Client(base_url=url, headers=head) as client:
        offer = client.get("/v1/rewards").json()
        assert offer["max_images"] == 2000 and offer["max_bytes"] == 8 * 2**20
        for size, status in ((offer["max_bytes"], 200), (offer["max_bytes"] + 1, 413)):
            asked = body_of(size)
            assert len(asked["content"]) == size
            assert client.post("/v1/score", **asked).status_code == status, size
        one = picture(size=(1, 1))
        assert len(ask(client, [one] * 2000).json()["scores"]["redness"]) == 2000
        for more in (2001, 2100):
            answer = ask(client, [one] * more)
            assert answer.status_code == 413 and "2000" in answer.json()["detail"], answer.text
        assert ask(client, [picture(size=(64, 64))]).status_code == 200
        assert ask(client, [picture(size=(241, 17))]).status_code == 413
        # the client fills a request to the brim
        asked, reward = [], HttpReward(url, batch=5000)
        score = reward._score
        reward._score = lambda files, *rest: asked.append(len(files)) or score(files, *rest)
        assert reward([Image.new("RGB", (1, 1), "red")] * 4001, ["a"] * 4001) == [1.0] * 4001
        assert sorted(asked) == [1, 2000, 2000]
        long = "a" * (2**20 + 2**19)
        assert reward(REDS[:2], [long] * 2) == near_of(REDS[:2])


def near_of(images):
    return load_rewards(["redness"])(images, [Prompt("a")] * len(images)).total.tolist()


def test_a_picture_may_be_as_large_as_is_announced(client, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)  # Pillow's own bound, twice that is too much
    for kind in ("PNG", "WEBP"):
        assert ask(client, [picture(kind, (100, 100))]).status_code == 200, kind
        assert ask(client, [picture(kind, (101, 100))]).status_code == 413, kind


def test_a_picture_that_is_too_large_by_itself_and_what_is_none(url):
    reward = HttpReward(url, "redness")
    with pytest.raises(UserError, match=r"row 1 has 1 pictures of 10100 pixels.*--max-megapixels"):
        reward([REDS[0], Image.new("RGB", (101, 100))], ["a", "a"])
    for made in (torch.zeros(2, 8000), np.zeros(8000, np.float32), []):
        with pytest.raises(UserError, match=r"row 1 is (Tensor|ndarray|list), neither.*sounds"):
            reward([REDS[0], made], ["a"] * 2)
    with pytest.raises(UserError, match=r"some rows are pictures and some are videos"):
        reward([REDS[0], [REDS[1]]], ["a"] * 2)


def test_videos_are_scored_as_in_the_same_process():
    lists = [REDS[:3], REDS[3:4], REDS[4:9], REDS[9:11]]
    arrays = [np.stack([np.asarray(frame) for frame in video]) for video in lists]
    tensors = [torch.from_numpy(video).permute(0, 3, 1, 2) for video in arrays]
    rows = [Prompt("a", {"k": row}) for row in range(4)]

    def tall(images, prompts, k):
        return [image.getpixel((0, 0))[0] + number for image, number in zip(images, k, strict=True)]

    near = load_rewards([PerFrame(tall)])(tensors, rows).total.tolist()
    assert near == pytest.approx([10 + 0, 30 + 1, 60 + 2, 95 + 3])
    with served(PerFrame(tall), redness, images=6) as url:
        far = load_rewards({"http": {"options": {"url": url, "reward": "video_tall"}}})
        for videos in (tensors, arrays, lists):
            assert far(videos, rows).total.tolist() == near
        with pytest.raises(UserError, match=r"row 0 has 7 pictures of 448 pixels.*--max-images"):
            far([REDS[:7]], rows[:1])
        with pytest.raises(UserError, match=r"422: reward 'video_tall' scores videos; a request"):
            far(REDS[:1], rows[:1])
        with pytest.raises(UserError, match=r"422: reward 'redness' scores pictures; a request"):
            HttpReward(url, "redness")([REDS[:2]], ["a"])
        head = {"Authorization": f"Bearer {TOKEN}"}
        with httpx.Client(base_url=url, headers=head) as client:
            common = {"rewards": ["video_tall"], "metadata": [{"k": 0}]}
            for frames, status in (
                ([2], 200),
                ([1], 400),
                ([0], 400),
                ([1, 1], 400),
                ([-1, 3], 400),
            ):
                answer = ask(client, [picture()] * 2, prompts=["a"], frames=frames, **common)
                assert answer.status_code == status, (frames, answer.text)


def test_health_and_the_description(url, client):
    assert httpx.get(f"{url}/health").json()["status"] == "ok"
    assert client.get("/v1/rewards").json()["rewards"] == ["redness", "counted", "picky"]
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/health", "/v1/score", "/v1/rewards"} <= set(paths)
    assert "413" in paths["/v1/score"]["post"]["responses"]


@pytest.mark.parametrize("header", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "é"}])
@pytest.mark.parametrize("path", ["/v1/score", "/v1/rewards", "/docs", "/openapi.json"])
def test_the_token(url, header, path):
    header = {key: value.encode() for key, value in header.items()}
    method = "POST" if path.endswith("score") else "GET"
    assert httpx.request(method, url + path, headers=header).status_code == 401


def bomb():
    """A PNG of 30 000 x 30 000 pixels in a few bytes."""

    def chunk(kind, body):
        sum_ = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + sum_

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000))


def webp_bomb():
    body = b"VP8X" + struct.pack("<I", 10) + bytes(4) + b"\xff\x3f\x00" * 2
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


MALFORMED = [
    (b"", 400),
    (b"not a picture", 400),
    (picture()[:40], 400),
    (picture()[:20], 400),
    (picture()[:-20].replace(b"IDAT", b"IDOT"), 400),
    (picture("WEBP")[:40], 400),
    (picture("WEBP")[:18], 400),
    (picture("JPEG"), 400),
    (picture("GIF"), 400),
    (picture("TIFF"), 400),
    (bomb(), 413),
    (webp_bomb(), 413),
    (picture(size=(101, 100)), 413),
    (picture("WEBP", save_all=True, append_images=[Image.new("RGB", (8, 8))]), 400),
]


@pytest.mark.parametrize(("data", "status"), MALFORMED)
def test_pictures_that_are_none(client, data, status):
    answer = ask(client, [picture(), data])
    assert answer.status_code == status and "Traceback" not in answer.text


@pytest.mark.parametrize(
    ("question", "status"),
    [
        ("", 422),
        ("{", 400),
        ("[]", 400),
        ('{"prompts": []}', 400),
        ('{"prompts": ["a", "b"]}', 400),
        ('{"prompts": ["a"], "metadata": [1]}', 400),
        ('{"prompts": ["a"], "metadata": []}', 400),
        ('{"prompts": ["a"], "else": 1}', 400),
        ('{"prompts": ["a"], "rewards": ["nothing"]}', 404),
        ('{"prompts": ["a"], "rewards": ["picky"]}', 422),
        ('{"prompts": ["a"], "metadata": [{"text": 5}], "rewards": ["picky"]}', 503),
        ('{"prompts": ["broken"], "rewards": ["counted"]}', 503),
        ('{"prompts": ["slow"], "rewards": ["counted"]}', 504),
        ('{"prompts": ["a"], "metadata": ' + "[" * 10000, 400),
        ("x" * 2_000_000, 413),
    ],
)
def test_requests_that_are_none(client, question, status):
    answer = client.post(
        "/v1/score", data={"request": question}, files=[("images", ("x", picture()))]
    )
    assert answer.status_code == status, answer.text


def test_bodies_that_are_none(client):
    assert client.post("/v1/score").status_code == 415
    assert client.post("/v1/score", json={"prompts": ["a"]}).status_code == 415
    broken = {"Content-Type": "multipart/form-data; boundary=x"}
    assert client.post("/v1/score", content=b"--x\r\nno", headers=broken).status_code in (400, 422)
    assert ask(client, [picture()] * 9).status_code == 413

    def endless():
        yield b'--x\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\n'
        for _ in range(1000):
            yield b"x" * 1000

    assert client.post("/v1/score", content=endless(), headers=broken).status_code == 413
    assert ask(client, [picture()]).status_code == 200


def test_many_at_once_are_scored_together(url):
    time.sleep(1)  # what was too slow has ended
    SIZES.clear()
    rewards = [HttpReward(url, "counted", batch=2) for _ in range(8)]

    def one(number):
        return rewards[number % 8](REDS[:2], ["a"] * 2, k=[number, -number])

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(one, range(40)))
    assert found == [[float(number), float(-number)] for number in range(40)]
    assert sum(SIZES) == 80 and max(SIZES) > 2 and len(SIZES) < 40


def test_one_bad_request_does_not_spoil_those_beside_it(url):
    def one(text):
        reward = HttpReward(url, "counted", retries=0)
        try:
            return reward(REDS[:1], [text])
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(one, ["a", "broken", "a", "a", "broken", "a"]))
    assert [answer for answer in found if answer != [0.5]] == [found[1], found[4]]
    assert "out of memory" in found[1]


def test_what_the_client_says(url, monkeypatch, tmp_path):
    rows = [Prompt("a")]
    with pytest.raises(UserError, match="serves redness, counted, picky, not 'rednes'"):
        HttpReward(url, "rednes").check(rows)
    with pytest.raises(UserError, match="set the option reward"):
        HttpReward(url).check(rows)
    with pytest.raises(UserError, match="DGPO_REWARD_URL"):
        HttpReward().check(rows)
    with pytest.raises(UserError, match=r"after 2 tries.*Connect"):
        HttpReward("http://127.0.0.1:9", retries=1, pause=0).check(rows)
    with pytest.raises(UserError, match="JSON cannot"):
        HttpReward(url, "counted")(REDS[:1], ["a"], k=[object()])
    (tmp_path / "wrong").write_text("wrong\n")
    with pytest.raises(UserError, match=r"401.*TOKEN_FILE"):
        HttpReward(url, token_file=str(tmp_path / "wrong")).check(rows)
    with pytest.raises(UserError, match=r"options.*unexpected"):
        load_rewards({"http": {"options": {"adress": url}}})


def test_rewards_are_ready_before_the_port_is_taken(tmp_path, monkeypatch):
    from dgpo.cli import commands

    listens = []
    monkeypatch.setattr(uvicorn, "run", lambda *given, **more: listens.append(more["http"]))
    monkeypatch.setenv("DGPO_CLIP", str(tmp_path / "none"))
    (tmp_path / "own.py").write_text(
        "class Loads:\n    loaded = 0\n"
        "    def check(self, prompts): Loads.loaded += 1\n"
        "    def __call__(self, images, prompts): return [0.0] * len(images)\n"
        "def odd(images, prompts): return [0.0]\n"
        "odd.check = lambda prompts: prompts[0]\n"
        "loads = Loads()\n"
    )

    def serve(*names):
        arguments = [part for name in names for part in ("--reward", name)]
        return CliRunner().invoke(commands.app, ["serve", *arguments])

    mine = f"{tmp_path / 'own.py'}:loads"
    for name, reason in (
        ("rednes", "did you mean 'redness'"),
        ("clip", "cannot load"),
        ("human", "dgpo rank"),
        ("variety", "compares the pictures of a group"),
        ("clap", "scores sounds"),
        (f"{tmp_path / 'own.py'}:odd", "check of no prompts raised IndexError"),
    ):
        answer = serve("redness", mine, name)
        assert answer.exit_code == 2 and reason in answer.stderr, (name, answer.output)
        assert not listens
    answer = serve(mine, mine, "redness")
    assert answer.exit_code == 0 and f"serving {mine}, redness;" in answer.output
    assert listens == [Connection]


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture
def process(tmp_path):
    """`dgpo serve` in a process of its own."""
    port, file = free_port(), tmp_path / "token"
    file.write_text(TOKEN + "\n")
    command = [sys.executable, "-c", "from dgpo.cli import main; main()", "serve"]
    command += ["--reward", "redness"]
    with subprocess.Popen(
        [*command, "--port", str(port), "--token-file", str(file)], stderr=subprocess.DEVNULL
    ) as running:
        url = f"http://127.0.0.1:{port}"
        for _ in range(1200):
            try:
                httpx.get(f"{url}/health")
                break
            except httpx.TransportError:
                assert running.poll() is None
                time.sleep(0.1)
        yield url, running
        running.kill()


@pytest.mark.parametrize("on_error", ["stop", "skip_group"])
def test_a_server_that_is_killed_in_the_middle_of_a_run(process, on_error, tmp_path, monkeypatch):
    from tiny_runs import light, rows, trainer

    light(monkeypatch)
    url, running = process
    options = {"url": url, "retries": 1, "pause": 0.01}
    settings = {"options": options, "on_error": on_error}

    class Killing(Callback):
        def on_iteration_begin(self, state, control, **what):
            if state.iteration == 1:
                os.kill(running.pid, signal.SIGKILL)
                running.wait()

    run = trainer(
        tmp_path / "run",
        {"http": settings},
        train={"iterations": 3},
        eval_dataset=["a red cat"],
        rollout={"batch": 4},
        callbacks=[Killing()],
    )
    if on_error == "stop":
        with pytest.raises(UserError, match=r"no answer from http.* after 2 tries"):
            run.train()
        assert len(rows(tmp_path / "run")) == 1
        return
    with pytest.warns(UserWarning, match="a group is left out"):
        run.train()
    found = rows(tmp_path / "run")
    assert [row["groups_skipped"] for row in found] == [0, 2, 2]
    assert found[0]["reward_mean"] is not None and found[1]["reward_mean"] is None
    assert found[1]["loss"] == 0 and (tmp_path / "run" / "lora").exists()


def test_what_the_command_refuses(tmp_path, monkeypatch):
    import typer

    app = typer.Typer()
    app.command()(dgpo.cli.serve.serve)

    def refused(*arguments):
        return str(CliRunner().invoke(app, ["--reward", "redness", *arguments]).exception)

    monkeypatch.setattr(uvicorn, "run", lambda *given, **more: pytest.fail("it listens"))
    assert "give --token-file" in refused("--host", "0.0.0.0")
    (tmp_path / "empty").write_text("\n")
    assert "one word" in refused("--token-file", str(tmp_path / "empty"))
    assert "token file" in refused("--token-file", str(tmp_path / "none"))
    monkeypatch.setattr(dgpo.cli.serve.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'dgpo[serve]'" in refused()
