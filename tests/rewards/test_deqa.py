"""DeQA-Score by a tiny model whose class lies as a Python file beside its weights."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPImageProcessor, PreTrainedTokenizerFast

from dgpo.errors import UserError
from dgpo.rewards.shipped.deqa import DeQA
from rewards.tiny import held, pictures

IMAGES = [*pictures(2, (32, 32)), *pictures(1, (40, 24), seed=1)]
WORDS = [
    "USER", "ASSISTANT", ":", "?", "How", "would", "you", "rate", "the", "quality", "of", "this",
    "image", "The", "is", "bad", "poor", "fair", "good", "excellent",
]  # fmt: skip
SIDE, WIDTH = 16, 8

REMOTE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class QualityConfig(PretrainedConfig):
    model_type = "tiny_quality"


class Quality(PreTrainedModel):
    config_class = QualityConfig
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.embed = torch.nn.Embedding(config.words, config.width)
        self.see = torch.nn.Linear(3 * config.side**2, config.width)
        self.speak = torch.nn.Linear(config.width, config.words)
        self.post_init()

    def forward(self, input_ids, images):
        assert self.config._attn_implementation == "eager"
        place = (input_ids == -200)[..., None]
        words = self.embed(input_ids.clamp(min=0))
        rows = torch.where(place, self.see(images.flatten(1))[:, None], words)
        weights = torch.arange(1.0, rows.shape[1] + 1)[:, None]  # order matters
        return CausalLMOutputWithPast(logits=self.speak((rows * weights).cumsum(1).tanh()))
"""


@pytest.fixture
def remote(tmp_path, monkeypatch):
    monkeypatch.delenv("DGPO_TRUST_REMOTE_CODE", raising=False)
    modules = tmp_path / "modules"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(modules))
    monkeypatch.setattr(sys, "path", [*sys.path])
    place = tmp_path / "tiny_quality"
    place.mkdir()
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", "<s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 2)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<s>"
    ).save_pretrained(place)
    CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SIDE).save_pretrained(place)
    (place / "quality.py").write_text(REMOTE)
    classes = {
        "AutoConfig": "quality.QualityConfig",
        "AutoModelForCausalLM": "quality.Quality",
    }
    config = {"model_type": "tiny_quality", "architectures": ["Quality"], "auto_map": classes}
    sizes = {"words": len(vocabulary), "width": WIDTH, "side": SIDE}
    (place / "config.json").write_text(json.dumps(config | sizes))
    torch.manual_seed(0)
    weights = {
        "embed.weight": 0.03 * torch.randn(len(vocabulary), WIDTH),
        "see.weight": 0.02 * torch.randn(WIDTH, 3 * SIDE**2),
        "see.bias": torch.randn(WIDTH),
        "speak.weight": torch.randn(len(vocabulary), WIDTH),
        "speak.bias": torch.randn(len(vocabulary)),
    }
    save_file(weights, place / "model.safetensors", {"format": "pt"})
    return place


def expected(place, image):
    """The paper's expected level from the saved weights, in numpy."""
    weights = {k: v.double().numpy() for k, v in load_file(place / "model.safetensors").items()}
    processor = CLIPImageProcessor.from_pretrained(place)
    side = max(image.size)
    grey = tuple(int(255 * value) for value in processor.image_mean)
    square = Image.new("RGB", (side, side), grey)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    pixels = processor(square, return_tensors="np")["pixel_values"][0].ravel()
    seen = weights["see.weight"] @ pixels + weights["see.bias"]
    text = (
        "USER : How would you rate the quality of this image ? | ASSISTANT : The quality of the "
        "image is"
    )
    rows = [weights["embed.weight"][2]]  # <s>
    for word in text.split():
        rows.append(seen if word == "|" else weights["embed.weight"][3 + WORDS.index(word)])
    hidden = np.tanh(sum((place + 1) * row for place, row in enumerate(rows)))
    logits = weights["speak.weight"] @ hidden + weights["speak.bias"]
    levels = np.exp([logits[3 + WORDS.index(w)] for w in ("bad", "poor", "fair", "good")])
    best = np.exp(logits[3 + WORDS.index("excellent")])
    return (levels @ [1, 2, 3, 4] + 5 * best) / (levels.sum() + best)


def test_the_score_is_the_expected_level(remote, monkeypatch):
    monkeypatch.setenv("DGPO_TRUST_REMOTE_CODE", "other, deqa")
    monkeypatch.setenv("DGPO_DEQA", str(remote))
    reward = DeQA(batch=2)
    got = reward(IMAGES, ["a"] * 3)
    assert len(held(reward)) == 1
    assert got == pytest.approx([expected(remote, image) for image in IMAGES], abs=1e-4)
    assert min(got) > 1 and max(got) < 5 and np.std(got) > 1e-2


def test_no_foreign_code_is_run_unless_asked_by_name(remote, monkeypatch):
    place = str(remote)
    with pytest.raises(UserError, match=r"runs the Python files.*DGPO_TRUST_REMOTE_CODE=deqa"):
        DeQA(place)
    monkeypatch.setenv("DGPO_TRUST_REMOTE_CODE", "other")
    with pytest.raises(UserError, match="DGPO_TRUST_REMOTE_CODE=deqa"):
        DeQA(place)
    assert DeQA(place, trust_remote_code=True)(IMAGES[:1], ["a"])[0] > 1


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(UserError, match="set DGPO_DEQA to where it is"):
        DeQA(str(tmp_path), trust_remote_code=True)


@pytest.mark.parametrize(
    ("there", "instead", "when"),
    [
        ("import torch\n", "import torch\nfrom transformers import LlamaOld\n", "load"),
        ("self.post_init()", "self.old_init()", "load"),
        ("place = (", "self.prepare_old()\n        place = (", "score"),
    ],
)
def test_files_for_another_transformers_say_what_can_be_done(remote, there, instead, when):
    (remote / "quality.py").write_text(REMOTE.replace(there, instead))
    advice = r"'deqa'.*do not run with transformers .*4\.36 and eager attention.*reward http"
    if when == "load":
        with pytest.raises(UserError, match=advice):
            DeQA(str(remote), trust_remote_code=True)
        return
    reward = DeQA(str(remote), trust_remote_code=True)
    with pytest.raises(UserError, match=advice):
        reward(IMAGES, ["a"] * 3)
