"""Judges behind an endpoint, against a server of this test."""

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from dgpo.errors import UserError
from dgpo.prompts import Prompt
from dgpo.rewards import RewardFailure, load_rewards
from dgpo.rewards.call_limits import Again
from dgpo.rewards.shipped.unified_reward import UnifiedReward
from dgpo.rewards.shipped.vlm_judge import VLMJudge

COLORS = ["red", "blue", "green"]
IMAGES = [Image.new("RGB", (8, 8), color) for color in COLORS]


class Server:
    """Answers chat completions by a function of the request; keeps the requests."""

    def __init__(self, answer):
        self.requests, self.headers = [], []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def reply(self, status, body):
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self):
                self.reply(200 if self.path == "/v1/models" else 404, {"data": []})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                assert self.path == "/v1/chat/completions"
                outer.requests.append(body)
                outer.headers.append(dict(self.headers))
                text = answer(body, len(outer.requests))
                if isinstance(text, tuple):
                    self.reply(*text)
                else:
                    self.reply(200, {"choices": [{"message": {"content": text}}]})

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def serve():
    servers = []

    def start(answer):
        servers.append(Server(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def parts(body):
    image, text = body["messages"][0]["content"]
    data = image["image_url"]["url"].removeprefix("data:image/png;base64,")
    return Image.open(io.BytesIO(base64.b64decode(data))), text["text"]


def by_color(body, _):
    """9 for red, 5 for blue, 2.5 for green."""
    red, _, blue = parts(body)[0].getpixel((0, 0))
    score = 9 if red > 99 else 5 if blue > 99 else 2.5
    return f"Score 1 is too low.\nScore: {score}"


def test_each_picture_gets_its_own_score_in_order(serve):
    server = serve(by_color)
    judge = VLMJudge(server.url, "m", key="secret", workers=3)
    assert judge(IMAGES, ["a {red} one", "b", "c"]) == [9.0, 5.0, 2.5]
    assert {body["model"] for body in server.requests} == {"m"}
    assert {body["temperature"] for body in server.requests} == {0.0}
    assert any('description: "a {red} one"' in parts(body)[1] for body in server.requests)
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer secret"}


@pytest.mark.parametrize(
    ("first", "reason"),
    [
        ("I cannot tell.", "no score in 'I cannot tell.'"),
        ("Score: 11", "11.0 is not in 0.0 to 10.0"),
        ((503, b"busy"), "status 503: busy"),
        ((429, b"slow down"), "status 429"),
        ((200, {"error": "?"}), "not a chat completion"),
    ],
)
def test_bad_answers_are_asked_again(serve, first, reason):
    server = serve(lambda body, count: first if count < 3 else "score = **7**")
    options = {"pause": 0.0, "retries": 2}
    assert VLMJudge(server.url, "m", **options)(IMAGES[:1], ["a"]) == [7.0]
    assert len(server.requests) == 3
    server = serve(lambda body, count: first)
    with pytest.raises(UserError, match="row 0") as error:
        VLMJudge(server.url, "m", **options)(IMAGES[:1], ["a"])
    assert reason in str(error.value) and "after 3 tries" in str(error.value)
    judge = VLMJudge(server.url, "m", fallback=0.0, **options)
    if "status" not in reason:
        assert judge(IMAGES[:1], ["a"]) == [0.0]
        return
    with pytest.raises(RewardFailure, match=reason) as failure:  # no answer is not a bad one
        judge(IMAGES[:1], ["a"])
    assert failure.value.gone


def test_a_refusal_is_not_asked_again(serve):
    server = serve(lambda body, count: (404, b"no such model"))
    with pytest.raises(UserError, match="status 404: no such model"):
        VLMJudge(server.url, "m", pause=0.0)(IMAGES[:1], ["a"])
    assert len(server.requests) == 1


def test_a_slow_server_is_a_reason_to_try_again(serve):
    wait = threading.Event()
    server = serve(lambda body, count: wait.wait(5) and "" if count == 1 else "Score: 3")
    judge = VLMJudge(server.url, "m", timeout=0.5, pause=0.0)
    assert judge(IMAGES[:1], ["a"]) == [3.0]
    wait.set()


def test_a_judge_that_is_gone_is_not_asked_about_each_group_again(serve, monkeypatch):
    server = serve(lambda body, count: "Score: 3")
    judge = VLMJudge(server.url, "m", pause=0.0, retries=1, workers=4)
    server.close()
    asked = []
    ask = judge._ask
    monkeypatch.setattr(judge, "_ask", lambda *given: asked.append(1) or ask(*given))
    rewards = load_rewards({judge: {"on_error": "skip_group"}})
    images = [Image.new("RGB", (4, 4))] * 32
    lost = rewards.score(images, [Prompt("a")] * 32, [row // 4 for row in range(32)]).lost
    assert sorted(lost) == list(range(8)) and "Connect" in lost[0]
    assert len(asked) <= 2 * 32


def test_a_judge_that_is_gone_is_never_a_score(serve):
    server = serve(lambda body, count: "Score: 3")
    judge = VLMJudge(server.url, "m", pause=0.0, retries=1, fallback=0.0)
    server.close()
    images, rows = [Image.new("RGB", (4, 4))] * 4, [Prompt("a")] * 4
    scored = load_rewards({judge: {"on_error": "skip_group"}}).score(images, rows, [0, 0, 1, 1])
    assert sorted(scored.lost) == [0, 1] and scored.by_name["vlm_judge"].isnan().all()
    with pytest.raises(RewardFailure, match=r"no score after 2 tries; the last: Connect"):
        load_rewards({judge: 1.0}).score(images, rows, [0, 0, 1, 1])


def test_as_many_connections_as_workers_and_an_address_that_is_none(serve):
    server = serve(by_color)
    with VLMJudge(server.url, "m", workers=150)._client() as client:
        assert client._transport._pool._max_connections == 150
    with pytest.raises(UserError, match=r"'vlm_judge': 'http://\[::'"):
        VLMJudge("http://[::", "m").check([Prompt("a")])


def test_one_picture_that_cannot_be_judged_costs_its_own_group(serve):
    def unsure(body, count):
        return "I cannot tell." if parts(body)[0].getpixel((0, 0))[0] > 99 else "Score: 3"

    judge = VLMJudge(serve(unsure).url, "m", pause=0.0, retries=0)
    rewards = load_rewards({judge: {"on_error": "skip_group"}})
    images = [IMAGES[1]] * 4 + [IMAGES[0], IMAGES[1]]
    scored = rewards.score(images, [Prompt("a")] * 6, [0, 0, 1, 1, 2, 2])
    assert list(scored.lost) == [2] and scored.by_name["vlm_judge"][:4].tolist() == [3.0] * 4


def test_what_is_not_set_or_not_there(serve, monkeypatch):
    for name in ("URL", "MODEL", "KEY"):
        monkeypatch.delenv(f"DGPO_JUDGE_{name}", raising=False)
    with pytest.raises(UserError, match="set DGPO_JUDGE_MODEL"):
        VLMJudge().check([Prompt("a")])
    monkeypatch.setenv("DGPO_JUDGE_MODEL", "m")
    with pytest.raises(UserError, match="set DGPO_JUDGE_URL to http"):
        VLMJudge().check([Prompt("a")])
    monkeypatch.setenv("DGPO_JUDGE_URL", "http://127.0.0.1:9/v1")
    with pytest.raises(UserError, match="no server at"):
        VLMJudge().check([Prompt("a")])
    server = serve(by_color)
    monkeypatch.setenv("DGPO_JUDGE_URL", server.url)
    VLMJudge().check([Prompt("a")])
    assert VLMJudge()(IMAGES[:1], ["a"]) == [9.0]


def test_templates_and_patterns_that_cannot_work():
    with pytest.raises(UserError, match=r"no \{prompt\}"):
        VLMJudge(template="how good?")
    with pytest.raises(UserError, match="no group"):
        VLMJudge(pattern=r"\d")


def test_unified_reward_has_its_scale_and_the_authors_question_can_be_given(
    serve, monkeypatch, tmp_path
):
    server = serve(lambda body, count: "Score: 4 for style.\nFinal Score: **3.5**")
    monkeypatch.setenv("DGPO_UNIFIED_REWARD_URL", server.url)
    monkeypatch.delenv("DGPO_UNIFIED_REWARD_MODEL", raising=False)
    assert UnifiedReward()(IMAGES[:1], ["a fox"]) == [3.5]
    assert server.requests[0]["model"] == "CodeGoat24/UnifiedReward-qwen-7b"
    assert "[a fox]" in parts(server.requests[0])[1]
    file = tmp_path / "question.txt"
    file.write_text("Theirs: {prompt}")
    monkeypatch.setenv("DGPO_UNIFIED_REWARD_TEMPLATE", str(file))
    UnifiedReward()(IMAGES[:1], ["a fox"])
    assert parts(server.requests[1])[1] == "Theirs: a fox"
    monkeypatch.setenv("DGPO_UNIFIED_REWARD_TEMPLATE", str(tmp_path / "none"))
    with pytest.raises(UserError, match="DGPO_UNIFIED_REWARD_TEMPLATE"):
        UnifiedReward()


ELEMENTS = "red fox (animal): 1\nsnow (location): 1\ntwo (count): 0\nwatercolor (style): 1\n"


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        (ELEMENTS + "Final Score: 3.5", 3.5),
        (ELEMENTS + "Final Score: 4.", 4.0),
        (ELEMENTS + "Final Score:\n2", 2.0),
        (ELEMENTS + "**Final Score:** 4.25", 4.25),
        (ELEMENTS + "Final Score: **1**", 1.0),
        (ELEMENTS + "Final Score: 4/5", 4.0),
        (ELEMENTS + "Final Score: [2.75]", 2.75),
        (ELEMENTS + "Final Score (1-5): 3", 3.0),
        (ELEMENTS + "Final Score (1 to 5): 3 out of 5", 3.0),
        ("final score = 5", 5.0),
        ("score board (object): 1\nfinal score (text): 0\nFinal Score: 2.5", 2.5),
        ("Final Score: 2\nNo, the fox is there.\nFinal Score: 4", 4.0),
        (ELEMENTS, None),
        (ELEMENTS + "Final Score: high", None),
        (ELEMENTS + "Final Score (1-5): unsure", None),
        (ELEMENTS + "Final Score: -3", None),
        (ELEMENTS + "Final Score: 0", None),
        (ELEMENTS + "Final Score: 6", None),
        (ELEMENTS + "Final Score: 35", None),
        (ELEMENTS + "Final Score: 3,5", None),
    ],
)
def test_answers_of_unified_reward_are_read(answer, score):
    judge = UnifiedReward("http://localhost:1", "m", template="{prompt}")
    if score is None:
        with pytest.raises(Again):
            judge._read(answer)
    else:
        assert judge._read(answer) == score


def test_unified_reward_is_shown_the_picture_and_then_asked(serve, monkeypatch):
    monkeypatch.delenv("DGPO_UNIFIED_REWARD_TEMPLATE", raising=False)
    server = serve(lambda body, count: ELEMENTS + f"Final Score: {count}")
    judge = UnifiedReward(server.url, "m")
    assert judge(IMAGES[:1], ["a {red} fox"]) == [1.0]
    picture, question = parts(server.requests[0])
    assert picture.getpixel((0, 0)) == IMAGES[0].getpixel((0, 0))
    assert question.endswith("Caption: [a {red} fox]") and '"element (kind): 1"' in question
    assert '"Final Score:"' in question
