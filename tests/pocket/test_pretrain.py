"""Pretraining stages resume where they stopped, bit for bit."""

import json
import runpy
import sys

import numpy as np
import pytest
import torch

from dgpo.pocket.scenes import COLORS, SHAPES, Scene, Shape, parse_caption
from dgpo.pocket.text import build_text_encoder, build_tokenizer
from tools.pretrain import captions
from tools.pretrain.build import build_transformer
from tools.pretrain.common import Stage, Training
from tools.pretrain.data import draw_scenes, layout_of
from tools.pretrain.measures import corrupt
from tools.pretrain.skills import scene_skill
from tools.pretrain.transformer import FlowData, FlowSettings, train_flow


def test_the_command_stands_in_the_root_of_a_clone(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pretrain", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("tools.pretrain", run_name="__main__")
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("--skill", "--stage", "scenes", "measures"))


def small_stage(folder, steps):
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    stage = Stage(folder, [layer], [optimizer], steps, seed=4, save_every=2)
    return stage, layer, optimizer


def go(stage, layer, optimizer, stop=None):
    for step in stage.run(lambda: {"weight": float(layer.weight.detach().sum())}, every=2):
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
    training = Training(steps=60, batch=16, lr=2e-3)
    captions.train_text_encoders(tmp_path, build_tokenizer(), words, labels, None, training)
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


def test_text_encoders_learn_what_each_word_is_about(tmp_path):
    words = ["a photo of a red circle", "a photo of a blue circle"]
    silent = [-2] * 5
    about = torch.tensor([[*silent, 0, *silent[1:]], [*silent, 1, *silent[1:]]])[..., None]
    labels, training = torch.tensor([[-1], [-1]]), Training(steps=60, batch=16, lr=2e-3)
    captions.train_text_encoders(tmp_path, build_tokenizer(), words, labels, about, training)
    log = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert log["worst"] == 1.0


def test_word_labels_stand_at_the_nouns():
    skill = scene_skill()
    assert skill.word_labels is not None
    row = skill.captions.index("a photo of a red circle and a blue square")
    labels = skill.word_labels[row]
    silent = torch.full((5,), -2)
    # a photo of a red CIRCLE and a blue SQUARE: shape, colour, count, place, relation
    assert labels[5].tolist() == [SHAPES.index("circle"), [*COLORS].index("red"), -1, 0, -1]
    assert labels[9].tolist() == [SHAPES.index("square"), [*COLORS].index("blue"), -1, 1, -1]
    assert all(torch.equal(labels[i], silent) for i in (0, 1, 2, 3, 4, 6, 7, 8))


def test_layout_says_what_each_patch_shows():
    shapes = (Shape("cross", "blue", 0.25, 0.25, 0.18), Shape("circle", "red", 0.75, 0.8, 0.15))
    scene = Scene(parse_caption("a photo of a cross and a circle"), shapes)
    layout = layout_of([scene, scene]).view(2, 4, 4, 2)
    assert torch.equal(layout[0], layout[1])
    assert layout[0, 0, 0].tolist() == [SHAPES.index("cross") + 1, [*COLORS].index("blue") + 1]
    assert layout[0, 3, 3].tolist() == [SHAPES.index("circle") + 1, [*COLORS].index("red") + 1]
    assert layout[0, 0, 3].tolist() == [0, 0]


def test_the_table_encodes_as_the_pipeline_does_and_once():
    tokenizer = build_tokenizer()
    encoders = (build_text_encoder(tokenizer), build_text_encoder(tokenizer))
    table = captions.CaptionTable(tokenizer, encoders)
    texts = ["a photo of a circle", "", "a photo of a circle", "a photo of two crosses"]
    hidden, pooled = table(texts)
    direct = captions.encode_text(encoders, captions.tokenize(tokenizer, texts))
    torch.testing.assert_close((hidden, pooled), direct)
    assert torch.equal(hidden[0], hidden[2])
    assert len(table.known) == 3


def test_rows_are_drawn_as_often_as_their_weights_say():
    data = FlowData(torch.zeros(3, 4, 8, 8), lambda *_: [], weights=torch.tensor([1.0, 0.0, 3.0]))
    rows = data.draw(8000, torch.Generator().manual_seed(0))
    assert rows.bincount(minlength=3).tolist() == pytest.approx([2000, 0, 6000], abs=160)


def test_a_transformer_stage_learns_layout_and_leaves_the_stock_model(tmp_path):
    tokenizer = build_tokenizer()
    encoders = (build_text_encoder(tokenizer), build_text_encoder(tokenizer))
    torch.manual_seed(0)
    transformer = build_transformer(8, 8, layers=2)
    processors = {type(p) for p in transformer.attn_processors.values()}
    keys = set(transformer.state_dict())
    scenes = draw_scenes(16, 0)
    data = FlowData(
        torch.randn(16, 4, 8, 8),
        lambda rows, _: [scenes[row].caption for row in rows],
        layout_of(scenes),
    )
    settings = FlowSettings(steps=12, batch=16, report=4)
    train_flow(
        tmp_path, transformer, captions.CaptionTable(tokenizer, encoders), data, settings, dict
    )
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < log[0]["loss"]
    assert log[-1]["layout"] < log[0]["layout"]
    assert {type(p) for p in transformer.attn_processors.values()} == processors
    assert set(transformer.state_dict()) == keys
    assert not transformer.transformer_blocks[1]._forward_hooks
