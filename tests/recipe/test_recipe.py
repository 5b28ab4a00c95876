"""Recipes: they load, they are refused with all that is wrong, they survive a round trip."""

import math
from pathlib import Path
from typing import get_args, get_origin

import pytest
import yaml

from dgpo.algorithms.dgpo import DGPO
from dgpo.errors import UserError
from dgpo.recipe import Recipe
from dgpo.recipe.files import (
    PACKAGED,
    TEXTS,
    apply_overrides,
    override,
    recipe_names,
    resumed,
)
from dgpo.recipe.plain_yaml import parse_yaml
from dgpo.settings import Settings

ROOT = Path(__file__).parents[2]
SMALL = {"rewards": {"redness": 1.0}, "prompts": {"train": "pocket-geneval/train"}}


def problem(data) -> str:
    with pytest.raises(UserError) as error:
        Recipe.from_dict(data)
    return str(error.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DGPO(bta=3), r"^DGPO: unknown key bta \(did you mean beta\?\)$"),  # pyright: ignore
        (lambda: DGPO(beta=-1), r"^DGPO: beta = -1: should be greater than 0$"),
        (lambda: Recipe(groupsize=1), r"^Recipe: unknown key groupsize .*group_size"),  # pyright: ignore
        (
            lambda: Recipe(model="pocket", train={"lr": -1}),  # pyright: ignore
            r"^Recipe: train\.lr = -1: should be greater than 0$",
        ),
    ],
)
def test_settings_made_in_python_are_refused_as_those_of_a_file(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize("file", sorted(PACKAGED.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_recipe_loads_by_name_and_survives_a_round_trip(file):
    recipe = Recipe.load(file.stem)
    assert recipe == Recipe.load(file)
    assert recipe.run.dir == f"runs/{file.stem}"
    assert Recipe.from_dict(yaml.safe_load(recipe.to_yaml())) == recipe
    assert file.read_text().startswith("# ")


def test_the_recipes_of_the_clone_are_those_of_the_package():
    assert (ROOT / "recipes").resolve() == PACKAGED.resolve()
    assert {"pocket-geneval", "pocket-ocr", "sd35m-geneval", "sd35m-ocr"} <= set(recipe_names())


@pytest.mark.parametrize(
    ("name", "beta", "kl", "clip", "std", "last", "group", "switch"),
    [
        ("geneval", 100, 0.02, 1e-2, "group", 4, 16, 500),
        ("ocr", 100, 0.02, 1e-2, "batch", 6, 16, 200),
        ("pickscore", 10, 0.001, 5e-2, "batch", 6, 24, 200),
    ],
)
def test_published_presets(name, beta, kl, clip, std, last, group, switch):
    guided = Recipe.load(f"sd35m-{name}")
    free = Recipe.load(f"sd35m-{name}-cfgfree")
    ema = Recipe.load(f"sd35m-{name}-cfgfree-ema")

    def said(recipe):
        a, r = recipe.algorithm, recipe.rollout
        return (r.guidance_scale, a.kl_cfg, a.beta, a.kl, a.clip, a.reference)

    assert said(guided) == (4.5, 1.0, beta, kl, clip, "frozen")
    assert said(free) == (1.0, 4.5, 100, 0.02, 1e-3, "frozen")
    assert said(ema) == (1.0, 1.0, 2000, 0.001, 1e-5, "ema")
    for recipe in (guided, free, ema):
        assert recipe.algorithm.advantage_std == std
        assert recipe.algorithm.timesteps.indices == (0, last)
        assert recipe.algorithm.timesteps.count == 4
        assert (recipe.group_size, recipe.groups_per_iteration) == (group, 8)
        assert recipe.rollout.switch_to_old_after == switch
        assert (recipe.rollout.steps, recipe.train.lr) == (10, 3e-4)
        assert recipe.lora is not None and (recipe.lora.rank, recipe.lora.alpha) == (64, 128)


def test_overrides_are_yaml_and_reach_into_sections():
    recipe = Recipe.load(
        "pocket-geneval",
        [
            "algorithm.clip=null",
            "algorithm.timesteps={count: 2, t_min: 0.3}",
            "train.lr=5e-5",
            "rewards={redness: 2}",
            "rollout.call.max_sequence_length=0",
            "lora=null",
            "run.dir=runs/x=y",
        ],
    )
    assert recipe.algorithm.clip is None
    assert recipe.algorithm.timesteps.indices is None and recipe.algorithm.timesteps.t_min == 0.3
    assert recipe.train.lr == 5e-5 and type(recipe.train.lr) is float
    assert recipe.rewards == {"redness": 2.0}
    assert recipe.rollout.call == {"max_sequence_length": 0}
    assert recipe.lora is None and recipe.run.dir == "runs/x=y"


def test_an_override_goes_below_a_section_that_the_file_leaves_out(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump({**SMALL, "algorithm": "dgpo", "lora": None}))
    recipe = Recipe.load(file, ["algorithm.beta=7", "lora.rank=4", "ema.every=1"])
    assert (recipe.algorithm.beta, recipe.lora.rank, recipe.ema.every) == (7.0, 4, 1)


@pytest.mark.parametrize(
    ("said", "read"),
    [
        ("runs/a #2", "runs/a #2"),
        ("2024", "2024"),
        ("1e3", "1e3"),
        ("on", "on"),
        ("b: c", "b: c"),
        ("{a", "{a"),
        ("1:30", "1:30"),
        ("'90s", "'90s"),
        (' "b: c" ', "b: c"),
        ("'2024'", "2024"),
    ],
)
def test_the_override_of_a_text_is_the_text(said, read):
    keys = {"run.dir": read, "prompts.train": read, "model": read}
    assert apply_overrides({}, [f"{key}={said}" for key in keys]) == {
        "run": {"dir": read}, "prompts": {"train": read}, "model": read,
    }  # fmt: skip
    for value in (read, said, f'"{read}"', "null", " x "):
        assert apply_overrides({}, [override("run.dir", value)]) == {"run": {"dir": value}}


def test_a_text_may_be_null():
    for null in ("null", "~", ""):
        assert apply_overrides({}, [f"prompts.eval={null}"]) == {"prompts": {"eval": None}}
    for odd in ("a\0b", "\x85", '"a\\Nb"', "a\ud800"):
        with pytest.raises(UserError, match=r"leave it out"):
            apply_overrides({}, [f"run.dir={odd}"])


def test_the_texts_are_the_keys_of_texts():
    def texts(model, prefix=""):
        for name, field in model.model_fields.items():
            kinds = set(get_args(field.annotation) or [field.annotation]) - {type(None)}
            if kinds == {str} and get_origin(field.annotation) is not list:
                yield prefix + name
            for kind in kinds:
                if isinstance(kind, type) and issubclass(kind, Settings):
                    yield from texts(kind, f"{prefix}{name}.")

    assert sorted(TEXTS) == sorted(texts(Recipe))


def test_a_recipe_in_a_run_folder_belongs_to_that_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, beside in (
        ("copy", "checkpoints/00000002"),
        ("rows", "metrics.jsonl"),
        ("on", "run.json"),
    ):
        place = tmp_path / name
        (place / beside).mkdir(parents=True)
        file = place / "recipe.yaml"
        file.write_text(yaml.safe_dump({**SMALL, "run": {"dir": "runs/orig", "name": "n"}}))
        for given in (file, f"{name}/recipe.yaml"):
            recipe = Recipe.load(given)
            assert Path(recipe.run.dir).absolute() == place and recipe.run.name == "n"
        assert Recipe.load(file, ["run.dir=other"]).run.dir == "other"
        # the folder's name is no YAML either
        name, overrides = resumed(name, [])
        assert Recipe.load(name, overrides).run.dir == name.removesuffix("/recipe.yaml")
    # a folder with a recipe of one's own, and other checkpoints
    (tmp_path / "checkpoints" / "sd3").mkdir(parents=True)
    own = tmp_path / "recipe.yaml"
    own.write_text(yaml.safe_dump({**SMALL, "run": {"dir": "runs/orig"}}))
    assert Recipe.load(own).run.dir == "runs/orig"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1:30", "1:30"),
        ("190:20:30.15", "190:20:30.15"),
        *((word, word) for word in ("on", "off", "yes", "No", "y", "NO")),
        ("1_000", "1_000"),
        ("010", "010"),
        ("0b11", "0b11"),
        ("2024-01-01", "2024-01-01"),
        ("2024-01-01T10:00:00Z", "2024-01-01T10:00:00Z"),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ("-12", -12),
        ("0x1F", 31),
        (".5", 0.5),
        ("1.", 1.0),
        ("3e-4", 3e-4),
        ("-.inf", -math.inf),
        ("'12'", "12"),
    ],
)
def test_plain_words_are_read_by_the_core_schema_of_yaml_1_2(text, value):
    (override,) = apply_overrides({}, [f"a={text}"]).values()
    file = parse_yaml(f"a: {text}\n", "f")["a"]
    assert override == file == value
    assert type(override) is type(file) is type(value)


def test_texts_that_look_like_numbers_are_written_as_texts():
    words = ["1e3", ".5e3", "yes", "010", "1:30", "0o7", "2024-01-01", "null", "~", "=", "1_0", ""]
    recipe = Recipe.from_dict({**SMALL, "run": {"dir": "1e3"}, "rollout": {"call": {"a": words}}})
    assert Recipe.from_dict(parse_yaml(recipe.to_yaml(), "r")) == recipe
    assert Recipe.from_dict(yaml.safe_load(recipe.to_yaml())) == recipe


def test_the_setting_decides_what_a_text_means():
    def load(*overrides: str) -> Recipe:
        return Recipe.load("pocket-geneval", overrides)

    recipe = load("train.iterations=1_000", "eval.at_start=no", "guards.stop=on", "run.dir=010")
    assert recipe.train.iterations == 1000 and recipe.run.dir == "010"
    assert recipe.eval.at_start is False and recipe.guards.stop is True
    with pytest.raises(UserError, match=r"train\.iterations = '1:30': should be a valid integer"):
        load("train.iterations=1:30")


@pytest.mark.parametrize("override", ["train.lr", "=3", "train..lr=1", "model.x=1", "train.lr=[1"])
def test_broken_overrides(override):
    with pytest.raises(UserError, match="override"):
        Recipe.load("pocket-geneval", [override])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"train": {"learning_rate": 1}}, ["unknown key train.learning_rate", "train.lr?"]),
        ({"algorithm": {"bta": 3}}, ["unknown key algorithm.bta", "algorithm.beta?"]),
        ({"algorithm": {"timesteps": {"cout": 3}}}, ["algorithm.timesteps.count?"]),
        ({"lr": 1}, ["unknown key lr", "train.lr?"]),
        ({"grup_size": 4}, ["group_size?"]),
        ({"lora": {"lora_alpha": 4}}, ["lora.alpha?"]),
        ({"algorithm": {"name": "dgop"}}, ["algorithm.name", "'dgop'", "'dgpo'"]),
        ({"algorithm": {"name": "torch:Tensor"}}, ["algorithm.name", "Tensor"]),
        ({"algorithm": {"beta": -1}}, ["algorithm.beta = -1", "greater than 0"]),
        ({"algorithm": 5}, ["algorithm = 5"]),
        ({"group_size": 1}, ["group_size = 1", "2 or more"]),
        ({"group_size": "x"}, ["group_size = 'x'", "integer"]),
        ({"train": {"lr": float("nan")}}, ["train.lr", "finite"]),
        ({"train": {"betas": [0.9]}}, ["train.betas"]),
        ({"lora": 5}, ["lora = 5"]),
        ({"rollout": 5}, ["rollout = 5"]),
        ({"precision": "fp16"}, ["precision = 'fp16'", "bfloat16"]),
        ({"rewards": {"redness": 0}}, ["rewards.redness", "weight of 0"]),
        ({"rewards": {"rednes": 1}}, ["'rednes'", "did you mean 'redness'"]),
        ({"rewards": ["redness"]}, ["rewards"]),
        ({"eval": {"metrics": ["nope"]}}, ["eval.metrics", "'nope'"]),
        ({"rollout": {"steps": 4}}, ["timesteps.indices = [0, 6]", "rollout.steps", "0 to 3"]),
        (
            {"rollout": {"steps": 3}, "algorithm": {"timesteps": {"indices": None}}},
            ["timesteps.count = 4", "rollout.steps = 3"],
        ),
        (
            {"algorithm": {"timesteps": {"indices": [0, 3], "t_min": 0.3}}},
            ["timesteps.indices", "t_min", "not both"],
        ),
        ({"algorithm": {"timesteps": {"count": 6, "indices": [0, 3]}}}, ["4 levels", "count=6"]),
        ({"rollout": {"call": {"num_inference_steps": 3}}}, ["rollout.call", "rollout.steps"]),
        ({"train": {"warmup": 100}}, ["train.warmup = 100", "100 optimiser steps"]),
        ({"train": {"sum_gradients": "micro_batch"}}, ["train.sum_gradients = 'micro_batch'"]),
        ({"train": {"micro_batch": 0}}, ["train.micro_batch = 0", "auto", "null"]),
        (
            {"train": {"sharding": "fsdp2", "sum_gradients": "micro_batch"}, "lora": {"rank": 4}},
            ["train.sum_gradients = 'micro_batch'", "lora: null"],
        ),
        ({"train": {"sharding_size": 2}}, ["train.sharding_size = 2", "train.sharding: fsdp2"]),
        (
            {"train": {"sharding": "fsdp2", "sharding_offload": True}, "lora": {"rank": 4}},
            ["train.sharding_offload = true", "lora: null"],
        ),
        (
            {"train": {"sharding": "fsdp2", "reshard": False}, "lora": None},
            ["train.reshard = false", "lora: null", "LoRA"],
        ),
        (
            {"train": {"sharding": "fsdp2"}, "memory": {"quantization": "torchao_int8"}},
            ["memory.quantization = 'torchao_int8'", "train.sharding = 'fsdp2'", "null"],
        ),
        (
            {"train": {"sharding": "fsdp2"}, "memory": {"snapshot_device": "cpu"}},
            ["memory.snapshot_device = 'cpu'", "train.sharding: none"],
        ),
        ({1: 2}, ["key 1"]),
    ],
)
def test_what_is_wrong_is_said_with_the_key_and_the_way_out(data, words):
    message = problem(data)
    for word in words:
        assert word in message
    assert "pydantic" not in message


def test_all_problems_are_listed_at_once():
    message = problem(
        {
            "train": {"lr": -1, "learning_rate": 2},
            "algorithm": {"beta": 0, "klx": 1},
            "seed": -3,
            "group_size": 0,
        }
    )
    assert "6 problems" in message
    for key in ("train.lr", "train.learning_rate", "algorithm.beta", "algorithm.klx", "seed"):
        assert key in message


def test_defaults_are_the_agreed_ones():
    recipe = Recipe()
    assert isinstance(recipe.algorithm, DGPO)
    assert (recipe.group_size, recipe.groups_per_iteration, recipe.images_per_iteration) == (
        16,
        8,
        128,
    )
    assert recipe.lora is not None and recipe.lora.targets == "auto"
    assert recipe.eval.every == 20 and recipe.checkpoint.every == 50


@pytest.mark.parametrize(
    ("group", "rows"), [(2, 16), (4, 16), (5, 15), (12, 12), (16, 16), (24, 24)]
)
def test_a_pass_on_a_gpu_takes_whole_groups(group, rows):
    assert Recipe(group_size=group).rows_at_once("cuda") == rows
    assert Recipe(group_size=group).rows_at_once("cpu") is None
    for size in (3, None):
        own = Recipe.from_dict({"group_size": group, "train": {"micro_batch": size}})
        assert own.rows_at_once("cuda") == own.rows_at_once("cpu") == size


def test_recipes_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        Recipe().seed = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_an_algorithm_object_is_taken_as_it_is():
    algorithm = DGPO(beta=3, clip=None)
    assert Recipe(algorithm=algorithm).algorithm is algorithm


def test_an_algorithm_of_a_file_is_found_again(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from dgpo.algorithms.dgpo import DGPO\n"
        "class Mine(DGPO):\n    name = 'mine'\n    extra: float = 1.0\n"
    )
    recipe = Recipe.from_dict({"algorithm": {"name": f"{file}:Mine", "extra": 2}})
    assert recipe.algorithm.extra == 2.0
    assert Recipe.from_dict(yaml.safe_load(recipe.to_yaml())) == recipe


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["empty"]),
        ("- a\n", ["list"]),
        ("seed: 1\nmodel: [\n", ["line 3", "not YAML"]),
        ("seed: 1\nmodel: pocket\nseed: 2\n", ["line 3", "'seed'", "twice"]),
        ("model: pocket\n", ["rewards is missing", "prompts.train is missing"]),
        ("a: !!python/object/apply:os.system ['true']\n", ["line 1", "no plain value"]),
    ],
)
def test_broken_files(tmp_path, text, words):
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        Recipe.load(file)
    for word in (*words, "r.yaml"):
        assert word in str(error.value)


def test_a_missing_recipe_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'pocket-geneval'"):
        Recipe.load("pocket-genevl")
    with pytest.raises(UserError, match="neither a file nor a recipe"):
        Recipe.load("no/such/pocket-geneval.yaml")


def test_numbers_without_a_dot_are_numbers(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(SMALL) + "rollout: {call: {a: 3e-4, b: 1e3, c: 12}}\n")
    assert Recipe.load(file).rollout.call == {"a": 3e-4, "b": 1000.0, "c": 12}
