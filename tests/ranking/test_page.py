"""The page over a real socket, and what strangers may send it."""

import io
import socket
import threading

import httpx
import numpy as np
import pytest
from PIL import Image

from dgpo.errors import UserError
from dgpo.ranking.desk import Desk
from dgpo.ranking.server import PageServer
from dgpo.ranking.store import Store

pytest.importorskip("fastapi")

PROMPT = "<img src=x onerror=alert(1)> & 'a cat'"
SHADES = [Image.new("RGB", (4, 4), (shade, 0, 0)) for shade in (10, 120, 250)]


@pytest.fixture
def desk(tmp_path):
    return Desk(Store(tmp_path / "ranking"))


def serve(desk, **settings):
    page = PageServer(port=0, **settings)
    page.start(desk, "likes")
    return page


@pytest.fixture
def client(desk):
    page = serve(desk)
    with httpx.Client(base_url=page.url) as made:
        yield made
    page.stop()


def test_what_a_prompt_speaks_of_is_shown(client, desk):
    blue = Image.new("RGB", (8, 6), (0, 0, 250))
    plain, group = desk.post("a cat", SHADES), desk.post("make it red", SHADES, {"image": blue})
    first, second = client.get("/v1/groups", params={"rater": "Ann"}).json()["groups"]
    assert (first["sources"], second["sources"]) == ([], ["image"])
    answer = client.get(f"/v1/groups/{group.id}/source/image.png")
    assert answer.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(answer.content)).tobytes() == blue.tobytes()
    for path in (f"{group.id}/source/mask.png", f"{plain.id}/source/image.png"):
        assert client.get(f"/v1/groups/{path}").status_code == 404
    assert client.get(f"/v1/groups/{group.id}/source/ranking.sqlite.png").status_code == 422


def test_a_person_ranks_while_somebody_waits(client, desk):
    assert client.get("/v1/groups", params={"rater": "Ann"}).json()["groups"] == []
    group = desk.post(PROMPT, SHADES, {"tag": "colors"})
    found: list[list[float]] = []
    waiting = threading.Thread(target=lambda: found.append(desk.rewards(group)))
    waiting.start()
    work = client.get("/v1/groups", params={"rater": "  Ann   Lee "}).json()
    (shown,) = work["groups"]
    assert shown["id"] == group.id and shown["prompt"] == PROMPT
    assert sorted(shown["places"]) == [0, 1, 2] and work["status"]["waiting"] == 1
    reds = []
    for place in range(3):
        answer = client.get(f"/v1/groups/{group.id}/{place}.png")
        assert answer.headers["content-type"] == "image/png"
        picture = Image.open(io.BytesIO(answer.content))
        reds.append(np.asarray(picture)[0, 0, 0])
    best = int(np.argmax(reds))
    said = {"rater": "Ann Lee", "answer": {"kind": "likes", "liked": [best]}, "seconds": 1.5}
    assert client.post(f"/v1/groups/{group.id}", json=said).json() == {"in_time": True}
    waiting.join(10)
    assert found == [[0.0, 0.0, 1.0]]
    work = client.get("/v1/groups", params={"rater": "Ann Lee"}).json()
    assert work["groups"] == [] and work["status"]["ranked"] == 1
    (last,) = client.get("/v1/last", params={"rater": "Ann Lee"}).json()["groups"]
    assert last["answer"] == {"kind": "likes", "liked": [2]}
    said["answer"] = {"kind": "order", "best_first": [0]}
    assert client.post(f"/v1/groups/{group.id}", json=said).json() == {"in_time": False}


def test_each_rater_sees_an_order_of_their_own_that_stays(client, desk):
    many = [Image.new("RGB", (4, 4), (shade, 0, 0)) for shade in range(12)]
    desk.post("a cat", many)
    orders = [
        tuple(client.get("/v1/groups", params={"rater": name}).json()["groups"][0]["places"])
        for name in ("ann", "bob", "cid", "ann")
    ]
    assert orders[0] == orders[3] and len(set(orders)) == 3


def test_the_page_shows_texts_as_texts_and_loads_nothing_from_elsewhere(client):
    answer = client.get("/")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "unsafe" not in answer.headers["content-security-policy"]
    script = client.get("/page.js").text
    for risky in ("innerHTML", "insertAdjacentHTML", "outerHTML", "document.write", "eval("):
        assert risky not in script
    for text in (answer.text, script, client.get("/page.css").text):
        assert "http:" not in text and "https:" not in text and "//cdn" not in text


GOOD = {"rater": "ann", "answer": {"kind": "likes", "liked": [0]}}


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"rater": ""}, 422),
        ({"rater": " \t "}, 422),
        ({"rater": "a\x00b"}, 422),
        ({"rater": "x" * 41}, 422),
        ({"answer": {"kind": "likes", "liked": [7]}}, 422),
        ({"answer": {"kind": "likes", "liked": [0, 0]}}, 422),
        ({"answer": {"kind": "stars", "stars": [1]}}, 422),
        ({"answer": {"kind": "rm"}}, 422),
        ({"seconds": -1}, 422),
        ({"more": 1}, 422),
        ({"rater": "x" * 70_000}, 413),
    ],
)
def test_a_bad_answer_is_refused_and_not_kept(client, desk, changes, status):
    group = desk.post("a cat", SHADES)
    answer = client.post(f"/v1/groups/{group.id}", json={**GOOD, **changes})
    assert answer.status_code == status and "detail" in answer.json()
    assert desk.store.answers(group) == {}


@pytest.mark.parametrize(
    "body", [b"\xff\xfe\x00", b'{"rater": "\xff"}', b"[" * 60_000, b"", b"null"]
)
def test_a_body_that_is_no_json_is_refused(client, body):
    answer = client.post(
        f"/v1/groups/{'0' * 32}", content=body, headers={"content-type": "application/json"}
    )
    assert answer.status_code in (400, 422), answer.text


def test_what_is_not_there_is_not_found(client, desk):
    group = desk.post("a cat", SHADES)
    (desk.store.folder / "secret.png").write_bytes(b"secret")
    for path in (
        f"/v1/groups/{'0' * 32}/0.png",
        f"/v1/groups/{group.id}/3.png",
        "/v1/last?rater=nobody",
        "/docs",
        "/openapi.json",
        "/../secret.png",
        "/v1/groups/..%2f..%2fsecret/0.png",
    ):
        assert client.get(path).status_code in (404, 422), path
    assert client.post(f"/v1/groups/{'0' * 32}", json=GOOD).status_code == 404


def test_pages_of_elsewhere_cannot_answer_for_a_person(client, desk):
    group = desk.post("a cat", SHADES)
    path = f"/v1/groups/{group.id}"
    text = '{"rater": "ann", "answer": {"kind": "likes", "liked": [0]}}'
    # a form or a simple request of another origin: it is no JSON, and no preflight is answered
    plain = client.post(path, content=text, headers={"content-type": "text/plain"})
    assert plain.status_code == 415
    asked = {"origin": "http://evil.example", "access-control-request-method": "POST"}
    preflight = client.request("OPTIONS", path, headers=asked)
    assert "access-control-allow-origin" not in preflight.headers
    # a name of its own that points here
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", ""):
        assert client.get("/", headers={"host": host}).status_code == 403, host
    for host in ("localhost:9", "127.0.0.1", "[::1]:8766"):
        assert client.get("/", headers={"host": host}).status_code == 200, host
    assert desk.store.answers(group) == {}


def test_connections_that_say_nothing_keep_nobody_out(client):
    place = (client.base_url.host, client.base_url.port)
    idle = [socket.create_connection(place) for _ in range(70)]
    assert client.get("/v1/groups", params={"rater": "ann"}).status_code == 200
    for one in idle:
        one.close()


def test_with_a_token_nothing_of_the_run_is_seen_without_it(desk, tmp_path):
    (tmp_path / "token").write_text("correct-horse\n")
    page = serve(desk, token_file=tmp_path / "token")
    group = desk.post(PROMPT, SHADES)
    with httpx.Client(base_url=page.url) as client:
        assert client.get("/").status_code == client.get("/page.js").status_code == 200
        paths = ["/v1/groups?rater=ann", "/v1/last?rater=ann", f"/v1/groups/{group.id}/0.png"]
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            for path in paths:
                assert client.get(path, headers=headers).status_code == 401
            answer = client.post(f"/v1/groups/{group.id}", json=GOOD, headers=headers)
            assert answer.status_code == 401
        right = {"Authorization": "Bearer correct-horse", "Host": "gpu1:8766"}
        assert client.get(paths[0], headers=right).json()["groups"][0]["prompt"] == PROMPT
        assert client.post(f"/v1/groups/{group.id}", json=GOOD, headers=right).is_success
    page.stop()
    assert list(desk.store.answers(group)) == ["ann"]


def test_what_the_server_refuses(tmp_path):
    with pytest.raises(UserError, match="give --token-file too"):
        PageServer(host="0.0.0.0", port=0)
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    with pytest.raises(UserError, match="choose another port"):
        PageServer(port=taken.getsockname()[1])
    taken.close()
