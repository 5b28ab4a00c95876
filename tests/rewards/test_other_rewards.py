"""VQAScore, CLAP, JPEG sizes, and the table of all rewards."""

import importlib
import io
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.signal import resample_poly
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from dgpo import registry
from dgpo.errors import UserError
from dgpo.registry import Entry
from dgpo.rewards import Reward, load_rewards
from dgpo.rewards.shipped.clap import ClapScore
from dgpo.rewards.shipped.vqascore import VQAScore
from dgpo.rewards.wrappers import Lazy
from rewards.tiny import held, pictures

IMAGES = pictures(3, (32, 32))


def word_tokenizer(words, **special):
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", **special
    )


TEMPLATE = (
    "{% for m in messages %}{% if m['role'] != 'system' %}USER : {% endif %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<image> {% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT :{% endif %}"
)


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    place = tmp_path_factory.mktemp("llava")
    words = ["USER", "ASSISTANT", ":", "Yes", "No", "show", "cat", "dog", "a", "yes", "or", "no"]
    words += ["A", "chat", "curious", "user", "polite"]
    tokenizer = word_tokenizer(words)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            **small, num_attention_heads=2, image_size=32, patch_size=8, projection_dim=8
        ),
        text_config=LlamaConfig(
            **small, num_attention_heads=2, num_key_value_heads=2, vocab_size=len(tokenizer)
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(place)
    LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(place)
    return str(place)


def test_vqascore_is_the_probability_of_yes(llava):
    prompts = ["a cat", "a dog", "a cat", "a cat", "a dog"]
    images = [*IMAGES, *pictures(1, (48, 32), 1), *pictures(1, (20, 40), 2)]
    reward = VQAScore(llava)
    got = reward(images, prompts)
    assert len(held(reward)) == 1
    model = LlavaForConditionalGeneration.from_pretrained(llava).eval()
    processor = LlavaProcessor.from_pretrained(llava)
    yes = processor.tokenizer.convert_tokens_to_ids("Yes")
    system = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. "
    )
    for image, prompt, score in zip(images, prompts, got, strict=True):
        question = f'Does this figure show "{prompt}"? Please answer yes or no.'
        text = system + "USER : " + "<image>" * 16 + f" {question} ASSISTANT :"
        tokens = processor.tokenizer(text, return_tensors="pt")
        side, mean = max(image.size), processor.image_processor.image_mean
        square = Image.new("RGB", (side, side), tuple(int(255 * one) for one in mean))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        pixels = processor.image_processor(square, return_tensors="pt")
        with torch.no_grad():
            logits = model(**tokens, **pixels).logits[0, -1]
        assert score == pytest.approx(float(logits.exp()[yes] / logits.exp().sum()), abs=1e-5)
    assert min(got) > 0 and max(got) < 1 and np.std(got) > 1e-5
    for other in ({"answer": "No"}, {"system": ""}):
        assert VQAScore(llava, **other)(images, prompts) != pytest.approx(got, abs=1e-6)
    cropped = VQAScore(llava, pad=False)(images, prompts)
    assert cropped[:3] == got[:3] and cropped[3] != pytest.approx(got[3], abs=1e-6)


def test_vqascore_that_cannot_ask(llava, tmp_path):
    with pytest.raises(UserError, match="set DGPO_VQASCORE"):
        VQAScore(str(tmp_path))
    processor = LlavaProcessor.from_pretrained(llava)
    processor.chat_template = processor.tokenizer.chat_template = None
    LlavaForConditionalGeneration.from_pretrained(llava).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no chat template"):
        VQAScore(str(tmp_path))


@pytest.fixture(scope="module")
def clap(tmp_path_factory):
    place = tmp_path_factory.mktemp("clap")
    config = ClapConfig(
        text_config={
            "vocab_size": 16, "hidden_size": 16, "intermediate_size": 16,
            "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 90,
        },
        audio_config={
            "spec_size": 64, "num_mel_bins": 16, "window_size": 2, "patch_embeds_hidden_size": 8,
            "depths": [1, 1], "num_attention_heads": [1, 1], "hidden_size": 16,
            "patch_size": 4, "patch_stride": [4, 4], "num_hidden_layers": 2,
            "enable_fusion": False,
        },
        projection_dim=8,
    )  # fmt: skip
    torch.manual_seed(0)
    model = ClapModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(place)
    ClapFeatureExtractor(
        feature_size=16, sampling_rate=8000, max_length_s=1, fft_window_size=256, hop_length=80,
        frequency_max=4000, truncation="rand_trunc", padding="repeatpad",
    ).save_pretrained(place)  # fmt: skip
    word_tokenizer(["a", "dog", "barks", "rain"]).save_pretrained(place)
    return str(place)


def sounds(seconds, rate, seed=0):
    random = np.random.default_rng(seed)
    times = np.arange(int(seconds * rate)) / rate
    tone = np.sin(2 * math.pi * random.uniform(200, 900) * times)
    return (0.3 * tone + 0.05 * random.standard_normal(times.size)).astype(np.float32)


def clap_cosine(folder, part, prompt):
    model = ClapModel.from_pretrained(folder).eval()
    features = ClapFeatureExtractor.from_pretrained(folder)
    tokens = PreTrainedTokenizerFast.from_pretrained(folder)(prompt, return_tensors="pt")
    with torch.no_grad():
        inputs = features(part, sampling_rate=8000, return_tensors="pt")
        heard = model.audio_model(**inputs).pooler_output
        a = model.audio_projection(heard)[0]
        read = model.text_model(tokens["input_ids"], tokens["attention_mask"]).pooler_output
        b = model.text_projection(read)[0]
    return float(a @ b / a.norm() / b.norm())


def test_clap_is_the_mean_cosine_of_the_stretches(clap):
    reward = ClapScore(clap, rate=8000)
    assert len(held(reward)) == 1
    short, long = sounds(0.7, 8000), sounds(2.7, 8000, 1)
    got = reward([short, torch.from_numpy(np.stack([long, long]))], ["a dog barks", "rain"])
    assert got[0] == pytest.approx(clap_cosine(clap, short, "a dog barks"), abs=1e-4)
    parts = [clap_cosine(clap, long[s : s + 8000], "rain") for s in (0, 8000, 16000)]
    assert got[1] == pytest.approx(np.mean(parts), abs=1e-4)
    assert reward([long], ["rain"]) == reward([long], ["rain"])  # no stretch is drawn at random
    assert np.std(parts) > 1e-5


def test_clap_resamples(clap):
    wave = sounds(0.9, 44_100)
    plain = resample_poly(wave, 80, 441).astype(np.float32)
    expected = [pytest.approx(clap_cosine(clap, plain, "rain"), abs=1e-4)]
    assert ClapScore(clap)([wave], ["rain"]) == expected
    assert ClapScore(clap, rate=8000)([wave], ["rain"], sampling_rate=[44_100]) == expected
    for bad in (np.zeros(0, np.float32), np.zeros((2, 2, 2), np.float32), np.zeros(9, np.int16)):
        with pytest.raises(UserError, match=r"row 0: .* is not a sound"):
            ClapScore(clap)([bad], ["rain"])


def test_jpeg_sizes():
    noise = pictures(1, (64, 64))[0]
    flat = Image.new("RGBA", (64, 64), "red")
    rewards = load_rewards(["jpeg_compressibility", "jpeg_incompressibility"])
    from dgpo.prompts import Prompt

    scores = rewards([noise, flat], [Prompt("a"), Prompt("b")]).by_name
    for place, image in enumerate((noise, flat)):
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, format="JPEG", quality=95)
        size = len(buffer.getvalue()) / 1000
        assert float(scores["jpeg_incompressibility"][place]) == pytest.approx(size)
        assert float(scores["jpeg_compressibility"][place]) == pytest.approx(-size)
    assert scores["jpeg_compressibility"][1] > scores["jpeg_compressibility"][0]


def test_every_reward_has_its_facts_and_can_be_looked_up_without_its_model():
    for name, entry in registry.REWARDS.items():
        assert callable(registry.resolve("reward", name))
        assert entry.about and entry.range and entry.licence


def test_the_page_and_the_docstrings_say_what_each_reward_is():
    page = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")
    table = [line for line in page.splitlines() if line.startswith("| `")]
    for name, entry in registry.REWARDS.items():
        if name.startswith("pocket_") or name in ("redness", "brightness"):
            continue
        assert any(f"`{name}`" in row.split("|")[1] for row in table), name
        module = importlib.import_module(entry.path.partition(":")[0])
        about = " ".join((module.__doc__ or "").split())
        if "icence, range and direction: those of the reward" in about:
            continue
        assert re.search(r"licence|Licence|MIT|Apache-2\.0", about), name
        assert re.search(r"Range|in practice|about \d|almost always", about), name
        assert "igher is better" in about, name


def test_what_is_missing():
    assert Entry("").missing() == ""
    assert Entry("", package="json").missing() == ""
    assert Entry("", package="no_such_module", install="pip install x").missing() == (
        "pip install x"
    )
    assert Entry("", setting="NO_SUCH_SETTING=1").missing() == "export NO_SUCH_SETTING=1"


def test_a_lazy_reward_is_built_once_by_check_or_call():
    built = []

    class Inner(Reward):
        name = "inner"

        def __init__(self):
            built.append("built")

        def check(self, prompts):
            built.append(len(prompts))

        def __call__(self, images, prompts, **columns):
            return [float(columns["k"][0])]

    lazy = Lazy(Inner)
    assert lazy.name == "inner" and not built
    lazy.check([1, 2])
    assert lazy([None], ["a"], k=[5]) == [5.0]
    assert built == ["built", 2]
