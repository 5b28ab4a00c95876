"""Evaluation: every prompt once, from its own seed, and figures as by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dgpo.evaluation.scoring
from dgpo.errors import UserError
from dgpo.evaluation import Metrics, Sampling, evaluate, sample_images, score, stratified_mean
from dgpo.models.pipeline.adapter import PipelineModel
from dgpo.prompts import Prompt
from dgpo.rewards import load_rewards
from dgpo.rewards.shipped.stand_in import brightness
from families.tiny import sd3_small

TEXTS = ["a photo of cat", "red dog", "the small house", "big table", "red dog"]
ROWS = [Prompt(text, {"tag": "xxyyy"[i]}) for i, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def model() -> PipelineModel:
    return PipelineModel(sd3_small(), call={"height": 16, "width": 16})


def pixels(images: Any) -> np.ndarray:
    return np.stack([np.asarray(image, np.int16) for image in images])


def check_batches(model: PipelineModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 13: one picture a prompt, and a picture that does not know its batch."""
    with monkeypatch.context() as patch:
        latents: dict[int, list[Any]] = {}
        right = model.rollout
        for batch in (5, 2, 1):
            seen = latents.setdefault(batch, [])

            def rollout(*args: Any, seen: list[Any] = seen, **named: Any) -> Any:
                made = right(*args, **named)
                seen.append(made.x0)
                return made

            patch.setattr(model, "rollout", rollout)
            images = sample_images(model, ROWS, Sampling(steps=2, batch=batch))
            assert len(images) == len(ROWS)
        whole = torch.cat(latents[5])
        for batch in (2, 1):
            parts = torch.cat(latents[batch])
            assert parts.shape == whole.shape
            assert torch.allclose(parts, whole, atol=1e-4)
        assert not torch.allclose(whole[1], whole[4], atol=1e-2)  # one text, two seeds


def test_the_batch_size_changes_nothing(
    model: PipelineModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_batches(model, monkeypatch)

    right = model.rollout

    def one_generator(cond: Any, *, generators: Any, **named: Any) -> Any:
        """The mistake: a batch has one stream of random numbers."""
        return right(cond, generators=[generators[0]] * cond.size, **named)

    monkeypatch.setattr(model, "rollout", one_generator)
    with pytest.raises(AssertionError):
        check_batches(model, monkeypatch)


def test_padding_would_be_noticed(model: PipelineModel, monkeypatch: pytest.MonkeyPatch) -> None:
    right = dgpo.evaluation.scoring.sample_images
    metrics = Metrics([brightness])
    report, images = evaluate(model, ROWS, metrics, Sampling(steps=2, batch=2))
    assert report.n == len(images) == 5

    def padded(*args: Any, **named: Any) -> Any:
        images = right(*args, **named)
        return [*images, images[-1]]  # the mistake: the last batch filled up

    monkeypatch.setattr(dgpo.evaluation.scoring, "sample_images", padded)
    with pytest.raises(ValueError, match="6 images for 5 prompts"):
        evaluate(model, ROWS, metrics, Sampling(steps=2, batch=2))


def test_a_row_may_bring_its_seed(model: PipelineModel) -> None:
    sampling = Sampling(steps=2)
    plain = pixels(sample_images(model, ROWS, sampling))
    own = [Prompt(TEXTS[1], {"seed": 1}), Prompt(TEXTS[0], {"seed": 0}), Prompt(TEXTS[2])]
    own += [Prompt(TEXTS[3], {"seed": None})]
    moved = pixels(sample_images(model, own, sampling))
    assert abs(moved - plain[[1, 0, 2, 3]]).max() <= 1
    assert abs(pixels(sample_images(model, ROWS, sampling, seed=7)) - plain).max() > 1


def numbers(values: list[float]) -> Any:
    def metric(images: Any, prompts: Any) -> list[float]:
        return values

    return metric


def test_categories_count_alike(model: PipelineModel) -> None:
    report = score(pictures(), ROWS, [numbers([1.0, 0.0, 1.0, 1.0, 1.0])], "by hand")
    assert report.categories == {"x": 0.5, "y": 1.0}
    assert report.overall == report.rewards["metric"] == 0.75
    half = 1.96 * math.sqrt(0.5 / 2) / 2
    assert report.ci95 == pytest.approx((0.75 - half, 0.75 + half))
    assert report.intervals == {"metric": report.ci95}
    untagged = score(pictures(), [Prompt(text) for text in TEXTS], [numbers([1, 0, 1, 1, 1])])
    assert untagged.overall == 0.8 and untagged.categories == {"all": 0.8}


def pictures() -> list[Any]:
    from PIL import Image

    return [Image.new("RGB", (4, 4), (50 * i, 0, 0)) for i in range(5)]


def test_the_stratified_mean_by_hand() -> None:
    values = torch.tensor([1.0, 2.0, 6.0, 0.0, 4.0, 8.0])
    tags = ["a", "b", "a", "b", "b", "c"]
    # a: 1 6, mean 3.5, s^2 12.5; b: 2 0 4, mean 2, s^2 4; c: one number, so s^2 of all six, 9.5
    mean, half = (3.5 + 2 + 8) / 3, 1.96 * math.sqrt(12.5 / 2 + 4 / 3 + 9.5) / 3
    assert stratified_mean(values, tags) == pytest.approx((mean, mean - half, mean + half))


def test_the_interval_covers_the_truth() -> None:
    """Of 400 evaluations with known means, about 95% hold the truth."""
    generator = torch.Generator().manual_seed(0)
    tags = ["a"] * 60 + ["b"] * 20
    chance = torch.tensor([0.7] * 60 + [0.4] * 20)
    held = 0
    for _ in range(400):
        draw = torch.bernoulli(chance, generator=generator)
        _, low, high = stratified_mean(draw, tags)
        held += low <= 0.55 <= high
    assert 0.91 < held / 400 < 0.98


def test_few_pictures_are_not_called_certain() -> None:
    """One of each category: 2 of 6 right is 0.33 give or take 0.41, not 0.33 to the last digit."""
    values = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 0.0])
    mean, low, high = stratified_mean(values, list("abcdef"))
    assert mean == pytest.approx(1 / 3)
    assert (mean - low, high - mean) == pytest.approx((0.4132, 0.4132), abs=1e-4)
    assert stratified_mean(values[:1], ["a"]) == (1.0, 1.0, 1.0)


def test_the_report_on_disk(tmp_path: Path) -> None:
    score(pictures(), ROWS, ["redness", "brightness"], "tiny").write(tmp_path / "report.json")
    body = json.loads((tmp_path / "report.json").read_text())
    assert set(body) == {"benchmark", "overall", "categories", "rewards", "n", "ci95", "lost"}
    assert (body["benchmark"], body["n"], body["lost"]) == ("tiny", 5, 0)
    assert list(body["rewards"]) == ["redness", "brightness"]
    assert len(body["ci95"]) == 2 and body["ci95"][0] <= body["overall"] <= body["ci95"][1]


class Whole:
    """A metric of the set."""

    of_set = True
    __name__ = "whole"

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def __call__(self, images: Any, prompts: Any, tag: Any) -> tuple[float, float, float]:
        self.calls.append((len(images), prompts, tag))
        return 2.0, 1.0, 3.5


def test_a_metric_of_the_whole_set_is_called_once() -> None:
    whole = Whole()
    report = score(pictures(), ROWS, ["brightness", whole])
    assert whole.calls == [(5, TEXTS, list("xxyyy"))]
    assert report.rewards["whole"] == 2.0 and report.intervals["whole"] == (1.0, 3.5)
    first = score(pictures(), ROWS, [whole])
    assert first.overall == 2.0 and first.ci95 == (1.0, 3.5) and first.categories == {}

    def wrong(images: Any, prompts: Any) -> float:
        return 1.0

    wrong.of_set = True
    with pytest.raises(UserError, match=r"'wrong' returned 1.0.*value, low, high"):
        score(pictures(), ROWS, [wrong])


def test_metrics_are_looked_up_once() -> None:
    made = []

    class Judge:
        def __init__(self) -> None:
            made.append(self)

        def __call__(self, images: Any, prompts: Any) -> list[float]:
            return [1.0] * len(images)

    class Other(Judge): ...

    metrics = Metrics([Judge, Other()])  # a class, and an object without a name of its own
    assert len(made) == 2 and metrics.names == ["Judge", "Other"]
    with pytest.raises(UserError, match="given twice"):
        Metrics(["redness", "redness"])
    rewards = load_rewards(["redness", brightness])
    assert Metrics(rewards).names == ["redness", "brightness"]
    for _ in range(2):
        score(pictures(), ROWS, metrics)
    assert len(made) == 2
    with pytest.raises(UserError, match="none given"):
        Metrics([])
