"""GenEval's models through their real loading paths, and the columns of a prompt row."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.overrides import TorchFunctionMode
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
    MaskFormerImageProcessorPil,
    SwinConfig,
    YolosConfig,
    YolosForObjectDetection,
    YolosImageProcessorPil,
)
from typer.testing import CliRunner

from dgpo.cli import app
from dgpo.errors import UserError
from dgpo.prompts import Prompt
from dgpo.rewards import load_rewards
from dgpo.rewards.offload import networks
from dgpo.rewards.shipped.clip import ClipEncoder, shared_encoder
from dgpo.rewards.shipped.geneval import (
    BACKGROUND,
    ColorNamer,
    Detector,
    Eyes,
    GenEval,
    cut_out,
    geneval,
    geneval_strict,
    instances,
    published,
)
from dgpo.rewards.shipped.geneval_judge import COLORS, Detection, judge
from dgpo.rewards.wrappers import Ranked
from rewards.tiny import clip_vectors, pictures, save_clip

LABELS = dict(enumerate(["dog", "sofa", "cat"]))
IMAGES = pictures(3, (64, 64))


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def mask2former(tmp_path_factory):
    place = tmp_path_factory.mktemp("mask2former")
    backbone = SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32,
        encoder_feedforward_dim=16, encoder_layers=1, decoder_layers=2, num_attention_heads=2,
        dim_feedforward=16, num_queries=6, id2label=LABELS,
        label2id={name: i for i, name in LABELS.items()},
    )  # fmt: skip
    torch.manual_seed(0)
    model = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        for parameter in model.class_predictor.parameters():
            parameter.mul_(20).add_(torch.randn_like(parameter))  # some classes are sure
    model.save_pretrained(place)
    Mask2FormerImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(place)
    return str(place)


@pytest.fixture(scope="module")
def yolos(tmp_path_factory):
    place = tmp_path_factory.mktemp("yolos")
    config = YolosConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        image_size=[64, 64], patch_size=16, num_detection_tokens=5, id2label=LABELS,
        label2id={name: i for i, name in LABELS.items()},
    )  # fmt: skip
    torch.manual_seed(0)
    model = YolosForObjectDetection(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    model.save_pretrained(place)
    YolosImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(place)
    return str(place)


def test_instances_are_those_of_the_models_outputs(mask2former):
    """Scores: class probability times the mean mask probability inside the mask."""
    found = Detector(mask2former, batch=2)(IMAGES, 0.1)
    model = Mask2FormerForUniversalSegmentation.from_pretrained(mask2former).eval()
    pixels = Mask2FormerImageProcessorPil.from_pretrained(mask2former)
    for image, got in zip(IMAGES, found, strict=True):
        with torch.no_grad():
            out = model(**pixels([image], return_tensors="pt"))
        probabilities = out.class_queries_logits[0].softmax(-1)[:, :-1]
        masks = torch.nn.functional.interpolate(
            out.masks_queries_logits, (384, 384), mode="bilinear", align_corners=False
        )[0]
        wanted = []
        for place in probabilities.flatten().topk(6).indices.tolist():
            query, label = divmod(place, 3)
            inside = masks[query] > 0
            mean = masks[query].sigmoid()[inside].mean() if inside.any() else torch.tensor(0.0)
            score = float(probabilities[query, label] * mean)
            if score >= 0.1:
                wanted.append((("dog", "couch", "cat")[label], round(score, 3)))
        assert sorted(wanted) == sorted((d.label, round(d.score, 3)) for d in got)
        for detection in got:
            left, top, right, bottom = map(int, detection.box)
            assert detection.mask.shape == (64, 64)
            assert detection.mask[top:bottom, left:right].sum() == detection.mask.sum() > 0
            assert detection.mask[top].any() and detection.mask[:, right - 1].any()
    assert sum(map(len, found)) > 3


class Waits(TorchFunctionMode):
    """Notes the calls for which a GPU would be waited for."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func.__name__ in ("nonzero", "tolist", "cpu", "item", "__bool__", "__int__"):
            self.seen.append(func.__name__)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("side", [384, None])
def test_instances_are_found_as_the_library_finds_them(side):
    generator = torch.Generator().manual_seed(3)
    logits = 4 * torch.randn(3, 20, 4, generator=generator)
    masks = torch.randn(3, 20, 12, 12, generator=generator) - 1.5
    masks[1] = -1.0  # nothing in this one
    outputs = SimpleNamespace(class_queries_logits=logits, masks_queries_logits=masks)
    sizes = [(40, 64), (64, 64), (40, 64)]
    library = Mask2FormerImageProcessorPil if side else MaskFormerImageProcessorPil
    wanted = library().post_process_instance_segmentation(
        outputs, threshold=0.3, target_sizes=sizes, return_binary_maps=True
    )
    with Waits() as waits:
        found = instances(outputs, [(40, 64)] * 3, 0.3, side)
    assert waits.seen == ["nonzero", "tolist", "cpu"] and len(found) > 10
    found = instances(outputs, sizes, 0.3, side)
    for row, result in enumerate(wanted):
        mine = [one for one in found if one.row == row]
        told = [(one["label_id"], one["score"]) for one in result["segments_info"]]
        assert told == [(one.label, one.score) for one in mine]
        for mask, one in zip(result["segmentation"], mine, strict=False):
            assert np.array_equal(mask.bool().numpy(), one.mask)
    assert len(found) > 10 and all(one.row != 1 for one in found)
    assert instances(outputs, sizes, 1.1, side) == []


def test_boxes_of_a_detector_without_masks(yolos):
    tall = pictures(2, (40, 80))
    found = Detector(yolos)(tall, 0.2)
    model = YolosForObjectDetection.from_pretrained(yolos).eval()
    pixels = YolosImageProcessorPil.from_pretrained(yolos)
    for image, got in zip(tall, found, strict=True):
        with torch.no_grad():
            out = model(**pixels([image], return_tensors="pt"))
        best = out.logits[0].softmax(-1)[:, :-1].max(-1)
        wanted = []
        for score, label, (x, y, w, h) in zip(
            best.values.tolist(), best.indices.tolist(), out.pred_boxes[0].tolist(), strict=True
        ):
            if score > 0.2:
                box = ((x - w / 2) * 40, (y - h / 2) * 80, (x + w / 2) * 40, (y + h / 2) * 80)
                wanted.append((("dog", "couch", "cat")[label], score, *box))
        assert wanted
        rows = [(d.label, d.score, *d.box) for d in got]
        for a, b in zip(sorted(wanted), sorted(rows), strict=True):
            assert a[0] == b[0] and a[1:] == pytest.approx(b[1:], abs=1e-3)
        assert all(d.mask is None for d in got)


def test_an_object_is_cut_out_on_grey():
    image = Image.new("RGB", (20, 10), "red")
    mask = np.zeros((10, 20), bool)
    mask[2:5, 3:9] = True
    mask[2, 3] = False
    cut = np.asarray(cut_out(image, Detection("dog", 0.9, (3.0, 2.0, 9.0, 5.0), mask)))
    assert cut.shape == (3, 6, 3)
    assert tuple(cut[0, 0]) == BACKGROUND and (cut[1:] == (255, 0, 0)).all()
    whole = cut_out(image, Detection("dog", 0.9, (-5.2, -3.0, 30.0, 40.0)))
    assert whole.size == (20, 10)
    assert cut_out(image, Detection("dog", 0.9, (19.9, 9.9, 30.0, 40.0))).size == (1, 1)


def test_a_colour_is_the_nearest_mean_of_three_texts(clip_folder):
    objects = [Detection("dog", 0.9, (4, 4, 40, 60)), Detection("dog", 0.8, (20, 0, 64, 30))]
    got = ColorNamer(ClipEncoder.load(clip_folder, "geneval", "X"))(IMAGES[0], objects, "dog")
    texts = [
        text
        for color in COLORS
        for text in (
            f"a photo of a {color} dog",
            f"a photo of a {color}-colored dog",
            f"a photo of a {color} object",
        )
    ]
    crops = [IMAGES[0].crop((4, 4, 40, 60)), IMAGES[0].crop((20, 0, 64, 30))]
    seen, read = clip_vectors(clip_folder, crops, texts)
    means = torch.stack(read).reshape(10, 3, -1).mean(1)
    means = means / means.norm(dim=-1, keepdim=True)
    assert got == [COLORS[int((means @ vector).argmax())] for vector in seen]


def rows():
    row = {"tag": "two_object", "include": [{"class": "dog", "count": 1, "color": "red"}]}
    more = {"tag": "counting", "include": [{"class": "couch", "count": 2}]}
    more["exclude"] = [{"class": "couch", "count": 3}]
    return [Prompt("a red dog", row), Prompt("two couches", more), Prompt("a red dog", row)]


def test_both_rewards_are_the_verdict_on_what_was_seen(mask2former, clip_folder, monkeypatch):
    eyes = Eyes(mask2former, clip_folder)
    calls = []
    see = eyes.detector.__call__
    monkeypatch.setattr(
        eyes, "detector", lambda images, least: calls.append(len(images)) or see(images, least)
    )
    soft = GenEval("geneval", eyes=lambda: eyes)
    strict = GenEval("geneval_strict", lambda verdict: float(verdict.strict), lambda: eyes)
    scores = load_rewards([soft, strict])(IMAGES, rows()).by_name
    assert calls == [3]  # the second reward looks at what the first one saw
    colors = ColorNamer(ClipEncoder.load(clip_folder, "geneval", "X"))
    for place, prompt in enumerate(rows()):
        objects = Detector(mask2former)([IMAGES[place]], 0.3)[0]

        def name(found, label, image=IMAGES[place]):
            return colors(image, found, label)

        verdict = judge(objects, {"exclude": None, **prompt.metadata}, name)
        assert scores["geneval"][place] == pytest.approx(verdict.partial)
        assert scores["geneval_strict"][place] == float(verdict.strict)


def test_the_networks_of_both_rewards_are_found(mask2former, clip_folder, monkeypatch):
    monkeypatch.setenv("DGPO_GENEVAL_DETECTOR", mask2former)
    monkeypatch.setenv("DGPO_CLIP", clip_folder)
    published.cache_clear()
    try:
        for reward in (geneval, geneval_strict):
            reward(IMAGES[:1], ["a dog"], include=[rows()[0].metadata["include"]])
        each = [networks([Ranked(reward)]) for reward in (geneval, geneval_strict)]
        assert [len(found) for found in each] == [2, 2]
        assert len(networks([geneval, geneval_strict])) == 2, "one detector and one CLIP for both"
    finally:
        published.cache_clear()
        for reward in (geneval, geneval_strict):
            vars(reward).pop("_eyes", None)


def test_rows_are_refused_before_models_are_loaded():
    def never():
        raise AssertionError("loaded")

    reward = GenEval(eyes=never)
    with pytest.raises(UserError, match=r"row 1: include = None.*jsonl with tag"):
        reward.check([rows()[0], Prompt("a dog")])
    with pytest.raises(UserError, match="prompt row 0"):
        reward([IMAGES[0]], ["a dog"])


def test_a_class_that_the_detector_does_not_know(yolos, clip_folder):
    eyes = Eyes(yolos, clip_folder)
    reward = GenEval(eyes=lambda: eyes)
    reward.check(rows())
    zebra = Prompt("a zebra", {"include": [{"class": "zebra", "count": 1}]})
    with pytest.raises(UserError, match=r"row 3: the detector does not know 'zebra'"):
        reward.check([*rows(), zebra])


def test_a_folder_without_a_detector(tmp_path):
    with pytest.raises(UserError, match="DGPO_GENEVAL_DETECTOR"):
        Detector(str(tmp_path))


def test_one_command_shows_what_is_seen(yolos, clip_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("DGPO_GENEVAL_DETECTOR", yolos)
    monkeypatch.setenv("DGPO_CLIP", clip_folder)
    published.cache_clear()
    IMAGES[0].save(tmp_path / "a.png")
    said = CliRunner().invoke(app, ["detect", str(tmp_path / "a.png"), "--least", "0.1"])
    published.cache_clear()
    assert said.exit_code == 0, said.exception
    expected = Detector(yolos)([IMAGES[0]], 0.1)[0]
    assert expected and f"{len(expected)} objects in 64 x 64 pixels" in said.output
    for one in expected:
        color = ColorNamer(shared_encoder(clip_folder))(IMAGES[0], [one], one.label)[0]
        row = next(line for line in said.output.splitlines() if f"{one.score:.3f}" in line)
        assert one.label in row and color in row


@pytest.mark.parametrize("name", ["gone.png", "text.png"])
def test_what_is_no_picture_is_said(name, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    said = CliRunner().invoke(app, ["detect", str(tmp_path / name)])
    assert said.exit_code != 0 and name in said.output
