"""`dgpo rank` with the pocket model: a dataset that grows over several sessions."""

import pytest
from typer.testing import CliRunner

import dgpo.cli.rank
from dgpo.cli import app
from dgpo.preferences import read_groups
from ranking.scripted import Rater, after, free_port, hears_ctrl_c

pytest.importorskip("fastapi")

SMALL = ["group_size=3", "rollout.steps=5", "rollout.guidance_scale=1"]


@pytest.fixture(autouse=True)
def ctrl_c():
    with hears_ctrl_c():
        yield


def rank(*arguments):
    return CliRunner().invoke(app, ["rank", "pocket-human", *SMALL, *map(str, arguments)])


def test_a_dataset_that_grows(tmp_path, monkeypatch):
    monkeypatch.setattr(dgpo.cli.rank, "FAREWELL", 0)
    for wanted, new in ((2, 2), (3, 1), (3, 0)):
        port = free_port()
        with Rater(port) as rater:
            done = rank("--groups", wanted, "--out", tmp_path, "--port", port)
        assert done.exit_code == 0, done.output
        assert f"http://127.0.0.1:{port}/" in done.output
        assert len(rater.answers) == new
        assert f"{wanted} ranked groups in {tmp_path}/groups.jsonl" in done.output
    groups = read_groups(tmp_path)
    assert len({group.text for group in groups}) == 3
    assert all(len(group.images) == 3 and max(group.rewards) == 1 for group in groups)
    assert all("tag" in group.metadata for group in groups)


def test_ctrl_c_keeps_what_was_ranked(tmp_path):
    port = free_port()
    with Rater(port, leave=after(2)):
        done = rank("--out", tmp_path, "--port", port, "--ahead", 2)
    assert done.exit_code == 0 and "stopped" in done.output
    assert len(read_groups(tmp_path)) == 2


def test_training_on_it_at_once(tmp_path):
    port, quick = free_port(), ["train.iterations=1", "groups_per_iteration=1", "samples.count=0"]
    quick += ["prompts.eval=null", f"run.dir={tmp_path / 'run'}"]
    with Rater(port):
        done = rank("--train", "--port", port, "--ask", "stars", "--out", tmp_path / "kept", *quick)
    assert done.exit_code == 0, done.output
    assert len(read_groups(tmp_path / "kept")) == 1 and (tmp_path / "run" / "lora").is_dir()
    again = rank("--train", "--port", port, *quick)
    assert again.exit_code == 2 and "already holds a run" in again.output


def test_what_the_command_refuses(tmp_path):
    for arguments, message in (
        (["--ask", "dates"], "one of likes, order, stars"),
        (["--host", "0.0.0.0"], "give --token-file too"),
        (["--train", "--groups", "3"], "the recipe says it"),
        (["--lora", tmp_path], "holds no LoRA"),
    ):
        done = rank("--out", tmp_path / "out", "--port", "0", *arguments)
        assert done.exit_code == 2 and message in done.output, done.output
    assert not (tmp_path / "out").exists()
