"""A prediction asks the pipeline only for what may have changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dgpo.core.process import Level
from families.tiny import conditioning, tiny_model


def _ready(name: str) -> tuple[Any, Any, torch.Tensor, Level]:
    model = tiny_model(name)
    cond = conditioning(name, model)
    made = model.rollout(cond, steps=3, decode=False)
    return model, cond, made.x0, made.levels[1]


@pytest.mark.parametrize("name", ["sd3", "sd15"])
def test_the_second_prediction_asks_nothing_twice(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, cond, xt, level = _ready(name)
    kind = type(model.pipe)
    first = model.predict(xt, level, cond)
    asked: list[str] = []
    own = kind.prepare_latents

    def prepare(pipe: Any, *given: Any, **named: Any) -> Any:
        asked.append("latents")
        return own(pipe, *given, **named)

    monkeypatch.setattr(kind, "prepare_latents", prepare)
    monkeypatch.setattr(kind, "_execution_device", property(lambda pipe: asked.append("device")))
    assert torch.equal(model.predict(xt, level, cond), first)
    assert asked == []
    assert type(model.pipe) is kind
    assert "_dgpo_device" not in vars(model.pipe)


def test_latents_of_another_number_of_rows_are_prepared_anew() -> None:
    model, cond, xt, level = _ready("sd3")
    both = model.predict(xt, level, cond)
    one = model.predict(xt[:1], level, cond.rows(torch.tensor([0])))
    torch.testing.assert_close(one, both[:1], atol=1e-5, rtol=1e-5)


def test_a_wrong_shape_is_refused_where_latents_are_known() -> None:
    model, cond, xt, level = _ready("sd3")
    model.predict(xt, level, cond)
    with pytest.raises(ValueError, match="works on"):
        model.predict(xt[..., :-1], level, cond)


def test_the_device_is_asked_anew_when_a_hook_moves_the_denoiser() -> None:
    model, cond, xt, level = _ready("sd3")
    model.predict(xt, level, cond)
    known = model._computes
    vars(model.denoisers["transformer"])["_hf_hook"] = object()
    model._computing_device()
    assert model._computes is not known


def test_the_class_comes_back_after_an_error() -> None:
    model, cond, xt, level = _ready("sd3")
    kind = type(model.pipe)
    with pytest.raises(ValueError, match="works on"):
        model.predict(xt[..., :-1], level, cond)
    assert type(model.pipe) is kind
