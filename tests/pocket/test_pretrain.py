"""Pretraining stages resume where they stopped, bit for bit."""

import json

import numpy as np
import torch

from dgpo.pocket.build import build_tokenizer
from dgpo.pocket.pretrain import captions
from dgpo.pocket.pretrain.common import Stage
from dgpo.pocket.pretrain.measures import corrupt


def small_stage(folder, steps):
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    stage = Stage(folder, [layer], [optimizer], steps, seed=4, save_every=2)
    return stage, layer, optimizer


def go(stage, layer, optimizer, stop=None):
    for step in stage.run(lambda: {"weight": float(layer.weight.sum())}, every=2):
        x = torch.randn(8, 3, generator=stage.generator(step))
        loss = (layer(x) - x.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        stage.note(loss=loss.item())
        if step == stop:
            return


def test_a_stopped_stage_goes_on_bit_for_bit(tmp_path):
    whole = small_stage(tmp_path / "whole", 8)
    go(*whole)
    go(*small_stage(tmp_path / "parts", 8), stop=5)  # stops within step 6: 4 steps are saved
    again = small_stage(tmp_path / "parts", 8)
    assert again[0].start == 4
    go(*again)
    assert torch.equal(whole[1].weight, again[1].weight)
    for one, two in zip(whole[0].average.values, again[0].average.values, strict=True):
        assert torch.equal(one, two)
    last = [
        json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[-1])
        for name in ("whole", "parts")
    ]
    assert last[0]["loss"] == last[1]["loss"]
    assert last[0]["weight"] == last[1]["weight"]


def test_the_average_is_what_is_evaluated_and_the_weights_come_back(tmp_path):
    stage, layer, optimizer = small_stage(tmp_path, 6)
    go(stage, layer, optimizer)
    own = layer.weight.detach().clone()
    with stage.average:
        assert not torch.equal(layer.weight, own)
    assert torch.equal(layer.weight, own)


def test_text_encoders_learn_to_read(tmp_path):
    words = [f"a photo of a {c} circle" for c in ("red", "blue", "green", "black")]
    labels = torch.tensor([[0], [1], [2], [3]])
    captions.train_text_encoders(tmp_path, build_tokenizer(), words, labels, steps=60, batch=16)
    log = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert log["worst"] == 1.0


def test_corruptions_grow_with_their_strength():
    torch.manual_seed(0)
    pixels = torch.nn.functional.avg_pool2d(torch.rand(4, 3, 32, 32) * 2 - 1, 5, 1, 2)
    for kind in ("blur", "noise", "colors"):
        errors = []
        for strength in (0.0, 0.3, 1.0):
            worse = corrupt(pixels, kind, strength, torch.Generator().manual_seed(0))
            errors.append(float((worse - pixels).abs().mean()))
        assert errors[0] < 1e-6
        assert np.all(np.diff(errors) > 0.01)
