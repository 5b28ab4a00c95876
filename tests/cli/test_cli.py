"""The command: its help, its errors and exit codes, and what its commands write."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import dgpo.cli.list
from commands import run
from families.parts import TEXT
from families.tiny import build, sd3

SAMPLE = ["sample", "--model", "x/y", "--prompt", "a", "--out"]
EVAL = ["eval", "--model", "x/y", "--benchmark", "pocket-geneval"]
PROMPTS = ["a photo of a red cat", "a small dog", "the big house"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("sd3")
    sd3().save_pretrained(place)
    return str(place)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ["train", "eval", "sample", "score", "list", "check", "plan", "export"]),
        (["train", "--help"], ["RECIPE", "KEY=VALUE", "--resume", "run.json"]),
        (["eval", "--help"], ["--model", "--lora", "--benchmark", "--prompts", "--json"]),
        (["score", "--help"], ["--reward", "--images", "--prompts", "--json"]),
        (["sample", "--help"], ["--prompts", "--steps", "--guidance-scale", "--seed"]),
    ],
)
def test_help_names_what_there_is(arguments, words):
    output = run(*arguments).output
    for word in words:
        assert word in output


def test_help_does_not_wait_for_torch():
    code = (
        "import sys\nfrom dgpo.cli import app\n"
        "try: app(['--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'diffusers', 'transformers', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_list_shows_every_kind_or_one():
    everything = run("list").output
    for word in ("models:", "dgpo", "pocket_geneval_strict", "pocket-ocr/train", "sd35m-ocr"):
        assert word in everything
    recipes = run("list", "recipes").output.splitlines()
    assert any(line.startswith("pocket-geneval ") and "quickstart" in line for line in recipes)
    assert "did you mean 'rewards'" in run("list", "reward", code=2).stderr


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["train", "nosuch"], "neither a file nor a recipe"),
        (["train", "pocket-geneval", "train.learning_rate=1"], "did you mean train.lr?"),
        (["train", "pocket-geneval", "group_size=1"], "group_size = 1"),
        (["eval", "--model", "pocket", "--benchmark", "pocket-genevl"], "'pocket-geneval'"),
        (["sample", "--model", "pocket", "--out", "x"], "either --prompt"),
        (["sample", "--model", "pocket", "--out", "x", "a"], "--prompt before the text"),
        (
            ["sample", "--model", "pocket", "--out", "x", "--prompts", "no.txt"],
            "does not exist",
        ),
        (
            ["sample", "--model", "x/y", "--lora", "no/dir", "--out", "x", "--prompt", "a"],
            "no/dir",
        ),
        (["check", "no/such/folder"], "no/such/folder"),
        ([*SAMPLE, "x", "--seed", str(2**63)], "--seed"),
        ([*SAMPLE, "x", "--guidance-scale", "nan"], "--guidance-scale"),
        ([*SAMPLE, "x", "--guidance-scale", "-1"], "--guidance-scale"),
        ([*SAMPLE, "x", "--device", "gpu9"], "--device gpu9"),
        ([*SAMPLE, __file__], "is a file"),
        ([*SAMPLE, f"{__file__}/x"], "is a file"),
        ([*EVAL, "--json", os.path.dirname(__file__)], "is a folder"),
        ([*EVAL, "--json", f"{__file__}/x.json"], "is a file"),
    ],
)
def test_a_users_mistake_is_one_message_and_exit_code_2(arguments, word):
    result = run(*arguments, code=2)
    assert word in result.stderr
    assert "Traceback" not in result.stderr and result.stdout == ""


def test_a_folder_that_is_no_pipeline(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    assert "holds no pipeline" in run("check", str(tmp_path), code=2).stderr


def test_a_run_folder_in_use_is_refused_before_anything_is_loaded(tmp_path):
    (tmp_path / "recipe.yaml").write_text("")
    result = run("train", "pocket-geneval", f"run.dir={tmp_path}", "model=no/such", code=2)
    assert "already holds a run" in result.stderr and "--resume" in result.stderr


def test_ctrl_c_ends_with_130_and_says_how_to_go_on(tmp_path, monkeypatch):
    import dgpo.trainer

    class Interrupted:
        def __init__(self, recipe, resume):
            self.recipe = recipe

        def train(self):
            place = tmp_path / "run"
            place.mkdir()
            (place / "recipe.yaml").write_text(self.recipe.to_yaml())
            raise KeyboardInterrupt

    monkeypatch.setattr(dgpo.trainer, "Trainer", Interrupted)
    result = run("train", "pocket-geneval", f"run.dir={tmp_path / 'run'}", code=130)
    assert f"dgpo train {tmp_path / 'run' / 'recipe.yaml'} --resume" in result.stderr


def test_ctrl_c_elsewhere(monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(dgpo.cli.list, "recipe_names", interrupt)
    assert "stopped" in run("list", code=130).stderr


def test_check_of_a_model_that_can_be_trained(folder):
    assert "StableDiffusion3Pipeline" in run("check", folder).output


def pictures(place):
    return {file.name: np.asarray(Image.open(file)) for file in sorted(place.glob("*.png"))}


def test_sample_writes_a_picture_for_each_row_in_order(folder, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    common = ["sample", "--model", folder, "--steps", "2", "--guidance-scale", "1"]
    run(*common, "--prompts", str(file), "--out", str(tmp_path / "a"), "--batch", "2")
    made = pictures(tmp_path / "a")
    assert list(made) == ["00000.png", "00001.png", "00002.png"]

    from diffusers import StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    for row, prompt in enumerate(PROMPTS):
        generator = torch.Generator().manual_seed(row)
        image = pipe(prompt, num_inference_steps=2, guidance_scale=1.0, generator=generator)
        alone = np.asarray(image.images[0]).astype(int)
        assert abs(alone - made[f"{row:05d}.png"]).max() <= 1  # batches round differently

    spread = ["--prompt", PROMPTS[0], *PROMPTS[1:], "--out", str(tmp_path / "b"), "--batch", "2"]
    run(*common, *spread)
    repeated = [a for p in PROMPTS for a in ("--prompt", p)]
    run(*common, *repeated, "--out", str(tmp_path / "c"), "--batch", "2", "--seed", "7")
    for name, picture in made.items():
        assert (pictures(tmp_path / "b")[name] == picture).all()
        assert (pictures(tmp_path / "c")[name] != picture).any()


def test_sample_finds_out_what_guidance_is(tmp_path):
    """Qwen-Image takes it as true_cfg_scale, with a negative prompt; guidance_scale is another."""
    folder = str(tmp_path / "qwen")
    build("qwen").save_pretrained(folder)
    common = ["sample", "--model", folder, "--steps", "2", "--prompt", PROMPTS[0]]
    common += [word for key, value in TEXT.items() for word in ("--call", f"{key}={value}")]
    made = []
    for scale in ("1", "7"):
        run(*common, "--guidance-scale", scale, "--out", str(tmp_path / scale))
        made.append(pictures(tmp_path / scale)["00000.png"])
    assert made[0].shape[0] == TEXT["height"] and (made[0] != made[1]).any()
    said = run(*common, "--call", "no", "--out", str(tmp_path / "x"), code=2).stderr
    assert "'no' is not KEY=VALUE" in said


def test_a_size_that_the_pipeline_refuses(folder, tmp_path):
    arguments = ["--prompt", "a", "--height", "7", "--out", str(tmp_path / "out")]
    for more in ([], ["--guidance-scale", "2"]):
        said = run("sample", "--model", folder, *arguments, *more, code=2).stderr
        assert "height=7" in said and "divisible" in said


def test_sample_with_a_lora_of_a_run_folder(folder, tmp_path):
    from dgpo.models import PipelineModel, Policy
    from dgpo.recipe import LoraSettings

    policy = Policy(PipelineModel(sd3()), LoraSettings(rank=2, alpha=4), seed=0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    policy.save(tmp_path / "run" / "lora", weights="policy")
    common = ["sample", "--model", folder, "--steps", "2", "--prompt", PROMPTS[0]]
    run(*common, "--out", str(tmp_path / "base"))
    run(*common, "--out", str(tmp_path / "one"), "--lora", str(tmp_path / "run"))
    run(*common, "--out", str(tmp_path / "two"), "--lora", str(tmp_path / "run" / "lora"))
    file = tmp_path / "run" / "lora" / "pytorch_lora_weights.safetensors"
    said = run(*common, "--out", str(tmp_path / "three"), "--lora", str(file)).output
    assert "tensors fit the transformer (rank 2)" in said
    base, one, two = (pictures(tmp_path / n)["00000.png"] for n in ("base", "one", "two"))
    assert (one == two).all() and (one != base).any()


def test_eval_writes_the_agreed_json(folder, tmp_path, monkeypatch):
    (tmp_path / "test_cli_rows.py").write_text(
        "def rows():\n"
        f"    return [dict(prompt=p, tag='abc'[i], seed=i) for i, p in enumerate({PROMPTS})]\n"
        "from dgpo.evaluation.benchmarks import Benchmark\n"
        "TINY = Benchmark('tiny', 'test_cli_rows:rows', ('redness', 'brightness'), steps=2)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    file = tmp_path / "out" / "report.json"
    arguments = ["--benchmark", "test_cli_rows:TINY", "--json", str(file)]
    output = run("eval", "--model", folder, *arguments).output
    report = json.loads(file.read_text())
    assert {"benchmark", "overall", "categories", "rewards", "n", "ci95"} <= set(report)
    assert (report["benchmark"], report["n"]) == ("tiny", 3)
    assert set(report["categories"]) == {"a", "b", "c"}
    assert report["rewards"]["redness"] == pytest.approx(report["overall"])
    assert report["ci95"][0] <= report["overall"] <= report["ci95"][1]
    assert f"{report['overall']:.4f}" in output
