from __future__ import annotations

import pytest
import torch

from dgpo.core import Groups
from oracles.toy import Toy


@pytest.fixture
def toy() -> Toy:
    return Toy(Groups.contiguous(2, 3))


def test_error_is_the_mean_over_all_dims_but_the_first(toy):
    points = toy.points()
    error = points.error(points.pred)
    assert error.shape == (6,) and error.dtype == torch.float64
    expected = [(p - t).square().mean() for p, t in zip(points.pred, points.target, strict=True)]
    torch.testing.assert_close(error, torch.stack(expected))
    assert torch.equal(points.error(points.target), torch.zeros(6).double())


def test_error_is_full_precision_for_half_precision_outputs(toy):
    fields = vars(toy.points())
    half = {name: fields[name].to(torch.float16) for name in ("pred", "target")}
    points = type(toy.points())(**{**fields, **half})
    assert points.error(points.pred).dtype == torch.float32


def test_error_refuses_to_broadcast(toy):
    points = toy.points()
    with pytest.raises(ValueError, match="one shape"):
        points.error(points.pred[:1])


@pytest.mark.parametrize("name", ["x0", "noise", "xt", "target", "ref", "old", "kl_ref"])
def test_shapes_of_predictions_must_agree(toy, name):
    fields = vars(toy.points())
    with pytest.raises(ValueError, match=f"{name} and pred"):
        type(toy.points())(**{**fields, name: torch.zeros(1, 2, 5)})


@pytest.mark.parametrize("name", ["advantages", "weights"])
def test_vectors_hold_one_number_a_sample(toy, name):
    fields = vars(toy.points())
    with pytest.raises(ValueError, match=name):
        type(toy.points())(**{**fields, name: torch.zeros(6, 1)})


def test_groups_must_be_those_of_the_samples(toy):
    fields = {**vars(toy.points()), "groups": Groups.contiguous(1, 3)}
    with pytest.raises(ValueError, match="groups"):
        type(toy.points())(**fields)


def test_a_snapshot_that_was_not_evaluated_is_named(toy):
    assert toy.points().snapshot("ref") is not None
    with pytest.raises(ValueError, match="'old'"):
        toy.points(old=None).snapshot("old")
