"""What must not happen: code that comes with data is run, secrets are written down, names in
prompts become names of files."""

from __future__ import annotations

import ast
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dgpo.errors import UserError
from dgpo.recipe import Recipe
from dgpo.rewards import load_rewards
from dgpo.rewards.shipped.http import HttpReward
from dgpo.serve.app import make_app
from serving import serving
from tiny_runs import trainer

SOURCES = sorted((Path(__file__).parents[1] / "src").rglob("*.py"))
RUNS_CODE = {"eval", "exec", "compile", "__import__", "system", "popen"}


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Every call of a file with its dotted name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_no_call_runs_what_data_says() -> None:
    for file in SOURCES:
        for name, call in calls(ast.parse(file.read_text(encoding="utf-8"))):
            assert name not in RUNS_CODE and not name.startswith("os.system"), (file, name)
            assert name not in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"), (file, name)
            words = {word.arg: word.value for word in call.keywords}
            shell = words.get("shell")
            assert shell is None or not ast.literal_eval(shell), (file, name)
            if "trust_remote_code" in words and ast.unparse(words["trust_remote_code"]) == "True":
                # the one reward that cannot do without; it asks for consent by its name
                assert file.name == "deqa.py", (file, name)


def test_code_beside_weights_is_not_run_unless_asked_for_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dgpo.rewards.shipped.deqa import DeQA

    monkeypatch.setenv("DGPO_TRUST_REMOTE_CODE", "all yes 1 deqa2")
    with pytest.raises(UserError, match="DGPO_TRUST_REMOTE_CODE=deqa"):
        DeQA(str(tmp_path))


SECRETS = {
    "HF_TOKEN": "hf_AbCdEfGhIjKlMnOpQrStUvWxYz",
    "HUGGING_FACE_HUB_TOKEN": "hf_OtherTokenOtherTokenOther",
    "DGPO_REWARD_TOKEN": "reward-token-in-the-environment",
    "DGPO_JUDGE_KEY": "sk-judge-key-judge-key",
    "DGPO_ROLLOUT_TOKEN": "rollout-token-rollout-token",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
}
IN_FILE = "token-that-a-file-holds"
IN_COMMAND = "token-on-the-command-line"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    app = make_app([load_rewards(["brightness"])], IN_FILE)
    with serving(app, "trace") as url:
        yield url


def test_secrets_are_neither_in_the_run_folder_nor_in_what_is_printed(
    served: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    token_file = tmp_path / "token.txt"
    token_file.write_text(f"{IN_FILE}\n")
    command = ["dgpo", "train", "r", f"--token={IN_COMMAND}", "--api-key", IN_COMMAND]
    monkeypatch.setattr(sys, "argv", [*command, f"x.token={IN_COMMAND}"])
    reward = HttpReward(served, "brightness", token_file=str(token_file))
    run = trainer(tmp_path / "run", reward, samples={"count": 2}, checkpoint={"every": 1})
    run.train()
    printed = capfd.readouterr()
    texts = {"printed": printed.out + printed.err, "log": caplog.text}
    files = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert {"recipe.yaml", "run.json", "README.md"} <= {file.name for file in files}
    contents = {str(file): file.read_bytes() for file in files}
    contents |= {name: text.encode() for name, text in texts.items()}
    for secret in (*SECRETS.values(), IN_FILE, IN_COMMAND):
        found = [name for name, content in contents.items() if secret.encode() in content]
        assert not found, (secret, found)
    assert b"--api-key" in contents[str(tmp_path / "run" / "run.json")]


def test_a_refused_token_is_not_repeated(served: str, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.txt"
    wrong.write_text("not-the-right-token")
    with pytest.raises(UserError, match="401") as error:
        HttpReward(served, "brightness", token_file=str(wrong)).check([])
    assert "not-the-right-token" not in str(error.value) and IN_FILE not in str(error.value)


@pytest.mark.parametrize("key", ["token", "api_key", "key", "password", "hf_token", "CREDENTIALS"])
def test_a_recipe_holds_no_secret(key: str) -> None:
    term = {"use": "http", "options": {key: "s3cr3t"}}
    with pytest.raises(UserError, match=rf"rewards.x.*options\.{key}.*token_file") as error:
        Recipe.from_dict({"rewards": {"x": term}})
    assert "s3cr3t" not in str(error.value)
    for url in ("http://me:s3cr3t@host/v1", "https://s3cr3t@host"):
        for read in (lambda r: Recipe.from_dict({"rewards": r}), load_rewards):
            with pytest.raises(UserError, match=r"options\.address") as error:
                read({"x": {"use": "http", "options": {"address": url}}})
            assert "s3cr3t" not in str(error.value)
    fine = {"use": "http", "options": {"token_file": "t", "max_tokens": 3, "monkey": 1}}
    assert Recipe.from_dict({"rewards": {"x": fine}}).rewards


@pytest.mark.parametrize(
    ("nested", "place"),
    [
        ({"headers": {"Authorization": "Bearer s3cr3t"}}, "headers.Authorization"),
        ({"headers": {"X-Api-Key": "s3cr3t"}}, "headers.X-Api-Key"),
        ({"a": [1, {"b": {"token": "s3cr3t"}}]}, r"a\[1\]\.b\.token"),
        ({"login": {"password": ["s3cr3t"]}}, "login.password"),
        ({"header": ["Accept", "Bearer s3cr3ts3cr3ts3cr3t"]}, r"header\[1\]"),
        ({"urls": ["http://a", "http://me:s3cr3t@b"]}, r"urls\[1\]"),
        ({"more": {"x": "hf_s3cr3ts3cr3ts3cr3t"}}, "more.x"),
        ({"apiKey": "s3cr3t"}, "apiKey"),
    ],
)
def test_a_recipe_holds_no_secret_however_deep(nested: dict[str, Any], place: str) -> None:
    read: list[Any] = [
        lambda: Recipe.from_dict({"rewards": {"x": {"use": "http", "options": nested}}}),
        lambda: load_rewards({"x": {"use": "http", "options": nested}}),
        lambda: Recipe.from_dict({"rollout": {"call": nested}}),
    ]
    for one in read:
        with pytest.raises(UserError, match=rf"(options|rollout\.call)\.{place}") as error:
            one()
        assert "s3cr3t" not in str(error.value)
    fine = {"negative_prompt": "bearer of news", "eta": 0.5, "token": None, "keys": ["a@b"]}
    assert Recipe.from_dict({"rollout": {"call": fine}})
    # neither is it repeated where it should not stand at all
    wrong: list[dict[str, Any]] = [
        {"prompts": {"train": nested}}, {"rewards": {"x": nested}}, {"algorithm": [nested]},
        {"rewards": {"x": {"options": [nested]}}}, {"rollout": {"sde": nested}}, {"model": nested},
        {"rewards": {"x": {"weight": nested}}}, {"run": {"dir": nested}},
    ]  # fmt: skip
    for data in wrong:
        with pytest.raises(UserError) as error:
            Recipe.from_dict(data)
        assert "s3cr3t" not in str(error.value), data


def test_an_override_with_a_secret_is_not_repeated() -> None:
    for word in (
        "rewards.x.options.token={s3cr3t",
        "rewards.x.options.headers={Authorization: Bearer s3cr3t",
        "rewards.x.options.headers={'key': 's3cr3t'",
        "lora.targets=[http://me:s3cr3t@h",
    ):
        with pytest.raises(UserError, match=r"override .*\*\*\*.*not YAML") as error:
            Recipe.load("pocket-geneval", [word])
        assert "s3cr3t" not in str(error.value)
    for word in ("prompts.train=https://me:s3cr3t@host/p.txt", "model=[http://me:s3cr3t@h"):
        with pytest.raises(UserError, match="holds a secret") as error:
            Recipe.load("pocket-geneval", [word])
        assert "s3cr3t" not in str(error.value)


def test_an_address_with_a_password_is_refused_without_it() -> None:
    with pytest.raises(UserError, match="comes with a password") as error:
        HttpReward("http://me:s3cr3t@127.0.0.1:1/x").check([])
    assert "s3cr3t" not in str(error.value) and "127.0.0.1" in str(error.value)


ODD_PROMPTS = [
    "../../up", "/etc/passwd", "a/b\\c", "$(touch ran) `touch ran` ; touch ran", "line\nbreak",
    "x" * 400, "<script>alert(1)</script>", "{0.__class__} %s {x!r}", "CON", "\u202efile.png",
]  # fmt: skip


def test_prompts_never_become_names_of_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "a" / "b" / "here"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    rows = [{"prompt": text, "tag": text, "text": text} for text in ODD_PROMPTS]
    every = {"samples": {"count": len(rows), "every": 1}, "eval": {"every": 1, "at_start": True}}
    every["train"] = {"iterations": 1}
    trainer(here / "run", train_dataset=rows, eval_dataset=rows, **every).train()
    plain = [text for text in ODD_PROMPTS if "/" not in text]
    for folder, folders, files in os.walk(tmp_path):
        assert Path(folder) in (tmp_path, tmp_path / "a", tmp_path / "a/b", here) or (
            here / "run" in (Path(folder), *Path(folder).parents)
        )
        for name in (*folders, *files):
            assert name.isascii() and len(name) < 100 and name not in plain, name
    assert sorted(os.listdir(here)) == ["run"]


def test_a_saved_recipe_names_no_class_of_python(tmp_path: Path) -> None:
    text: Any = Recipe.from_dict({"rewards": {"brightness": 1.0}}).to_yaml()
    assert "!!" not in text
