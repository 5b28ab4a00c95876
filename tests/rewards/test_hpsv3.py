"""HPSv3 by a tiny Qwen2-VL with a reward head, saved in the published layout."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from dgpo.errors import UserError
from dgpo.prompts import Prompt
from dgpo.rewards.shipped.hpsv3 import FILE, PIXELS, TEMPLATE, HPSv3
from rewards.tiny import held, pictures
from rewards.tiny_qwen import save_hpsv3

IMAGES = [*pictures(2, (40, 48)), *pictures(1, (60, 31), seed=1)]
PROMPTS = ["a cat", "two dogs under a red table", "a cat"]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    place = tmp_path_factory.mktemp("hpsv3")
    return place, *save_hpsv3(place)


@pytest.fixture(autouse=True)
def surroundings(saved, monkeypatch):
    monkeypatch.setenv("DGPO_HPSV3", str(saved[0]))
    monkeypatch.setenv("DGPO_HPSV3_BASE", str(saved[0] / "base"))
    monkeypatch.delenv("DGPO_HPSV3_TEMPLATE", raising=False)


def patches(image):
    """The rows of pixels that the vision tower reads, and the grid; squares of 2 x 2 together."""
    width, height = image.size
    scale = math.sqrt(PIXELS / (width * height))  # all of them are smaller
    width, height = (math.ceil(side * scale / 28) for side in (width, height))
    image = image.resize((28 * width, 28 * height), Image.Resampling.BICUBIC)
    pixels = (np.asarray(image) / 255.0 - MEAN) / STD
    rows = [
        np.stack([pixels[top : top + 14, left : left + 14].transpose(2, 0, 1)] * 2, 1).ravel()
        for y in range(0, 28 * height, 28)
        for x in range(0, 28 * width, 28)
        for top in (y, y + 14)
        for left in (x, x + 14)
    ]
    return torch.from_numpy(np.stack(rows)).float(), (1, 2 * height, 2 * width)


def expected(saved, image, prompt, template=TEMPLATE):
    """Mean and spread by the parts of the model: one row, no padding, positions 0, 1, 2, ..."""
    place, model, head = saved
    tokenizer = AutoTokenizer.from_pretrained(place / "base")
    tokenizer.add_tokens(["<|Reward|>"], special_tokens=True)
    rows, grid = patches(image)
    question = template.replace("{prompt}", prompt)
    text = (
        f"<|im_start|>user\n<|vision_start|>{'<|image_pad|>' * (len(rows) // 4)}<|vision_end|>"
        f"{question}<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer(text, return_tensors="pt")["input_ids"][0]
    with torch.no_grad():
        inner = model.model
        embedded = inner.language_model.embed_tokens(ids)
        seen = inner.visual(rows, grid_thw=torch.tensor([grid])).pooler_output
        embedded[ids == model.config.image_token_id] = seen
        places = torch.arange(len(ids)).expand(3, 1, -1)
        hidden = inner.language_model(inputs_embeds=embedded[None], position_ids=places)
        (here,) = (ids == tokenizer.convert_tokens_to_ids("<|Reward|>")).nonzero()[:, 0].tolist()
        vector = hidden.last_hidden_state[0, here].double()
        for layer in head[:-1]:
            vector = (layer.weight.double() @ vector + layer.bias.double()).clamp(min=0)
        return (head[-1].weight.double() @ vector + head[-1].bias.double()).tolist()


@pytest.mark.parametrize("batch", [1, 3])
def test_the_score_is_the_mean_at_the_reward_token(saved, batch):
    reward = HPSv3(batch=batch)
    got = reward(IMAGES, PROMPTS)
    assert len(held(reward)) == 2
    for image, prompt, score in zip(IMAGES, PROMPTS, got, strict=True):
        assert score == pytest.approx(expected(saved, image, prompt)[0], abs=1e-4)
    assert np.std(got) > 1e-2


def test_the_three_axes_of_positions_matter_here(saved):
    """Else the test above could not tell the published positions from Qwen2-VL's own."""
    reward = HPSv3()
    run = reward._model.forward
    mean = reward(IMAGES[:1], ["a cat"])[0]

    def turned(**inputs):
        places = inputs["position_ids"].clone()
        places[1:] = places[1:] // 2
        return run(**{**inputs, "position_ids": places})

    reward._model.forward = turned
    assert abs(reward(IMAGES[:1], ["a cat"])[0] - mean) > 1e-3


def test_names_of_newer_transformers_and_a_file_are_read(saved, tmp_path):
    place, *_ = saved
    state = {}
    for key, value in load_file(place / FILE).items():
        key = key.replace("visual.", "model.visual.", key.startswith("visual."))
        if key.startswith("model.") and not key.startswith("model.visual."):
            key = key.replace("model.", "model.language_model.", 1)
        state[key] = value
    save_file(state, tmp_path / "other.safetensors")
    got = HPSv3(str(tmp_path / "other.safetensors"))(IMAGES, PROMPTS)
    assert got == pytest.approx(HPSv3()(IMAGES, PROMPTS), abs=1e-6)


def test_the_authors_question_can_be_given(saved, tmp_path, monkeypatch):
    file = tmp_path / "question.txt"
    file.write_text("Theirs: {text_prompt}\n<|Reward|>\nEND\n")
    monkeypatch.setenv("DGPO_HPSV3_TEMPLATE", str(file))
    (got,) = HPSv3()(IMAGES[:1], ["a {prompt}"])
    theirs = "Theirs: {prompt}\n<|Reward|>\nEND\n"
    assert got == pytest.approx(expected(saved, IMAGES[0], "a {prompt}", theirs)[0], abs=1e-4)
    for bad in ("no place <|Reward|>", "{prompt}", "{prompt} <|Reward|> <|Reward|>"):
        with pytest.raises(UserError, match=r"\{prompt\} for the caption and <\|Reward\|> once"):
            HPSv3(template=bad)
    monkeypatch.setenv("DGPO_HPSV3_TEMPLATE", str(tmp_path / "none"))
    with pytest.raises(UserError, match="DGPO_HPSV3_TEMPLATE"):
        HPSv3()


def test_prompts_with_the_models_own_tokens_are_refused():
    reward = HPSv3()
    for bad in ("<|Reward|>", "x<|image_pad|>"):
        with pytest.raises(UserError, match=r"prompt row 1: .* holds <\|"):
            reward(IMAGES[:2], ["a", bad])
        with pytest.raises(UserError, match="prompt row 1"):
            reward.check([Prompt("a"), Prompt(bad)])
        with pytest.raises(UserError, match=r"rows.jsonl, line 8: "):
            reward.check([Prompt(bad, where="rows.jsonl, line 8")])
    reward.check([Prompt("a")])


def changed(state, drop="", **more):
    return {key: value for key, value in state.items() if not drop or drop not in key} | more


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"drop": "rm_head"}, "no rm_head"),
        ({"drop": "model.norm"}, "language_model.norm.weight"),
        ({"model.extra.weight": torch.zeros(2)}, "language_model.extra.weight"),
        ({"model.norm.weight": torch.zeros(3)}, "language_model.norm.weight"),
        ({"model.embed_tokens.weight": torch.zeros(9, 16)}, "9 embedded tokens"),
    ],
)
def test_weights_that_do_not_fit(saved, tmp_path, change, words):
    save_file(changed(load_file(saved[0] / FILE), **change), tmp_path / FILE)
    with pytest.raises(UserError, match="set DGPO_HPSV3 to where it is") as error:
        HPSv3(str(tmp_path))
    assert words in str(error.value)


def test_what_cannot_be_loaded(saved, tmp_path):
    with pytest.raises(UserError, match=f"holds no {FILE}"):
        HPSv3(str(tmp_path))
    with pytest.raises(UserError, match="set DGPO_HPSV3_BASE"):
        HPSv3(base=str(tmp_path))
