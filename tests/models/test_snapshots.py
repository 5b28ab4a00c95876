"""Moving averages: the formula, and that exchanging weights leaves no trace."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from dgpo.errors import UserError
from dgpo.models.weights.snapshots import Snapshot, base_fingerprints, exchanged


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(3, 4, generator=generator)) for _ in range(3)]


def test_update_is_the_moving_average() -> None:
    weights = parameters()
    snapshot = Snapshot(weights)
    expected = [w.detach().clone() for w in weights]
    for step, decay in enumerate((0.9, 0.3, 0.5)):
        for w in weights:
            w.data += step + 1.0
        snapshot.update(decay)
        expected = [
            decay * e + (1 - decay) * w.detach() for e, w in zip(expected, weights, strict=True)
        ]
        for tensor, e in zip(snapshot.tensors, expected, strict=True):
            torch.testing.assert_close(tensor, e)


def test_decay_zero_copies_and_one_keeps() -> None:
    weights = parameters()
    snapshot = Snapshot(weights)
    before = [t.clone() for t in snapshot.tensors]
    for w in weights:
        w.data *= 1.234567
    snapshot.update(1.0)
    assert all(torch.equal(t, b) for t, b in zip(snapshot.tensors, before, strict=True))
    snapshot.update(0.0)
    assert all(torch.equal(t, w) for t, w in zip(snapshot.tensors, weights, strict=True))


def test_swapped_restores_bit_for_bit_and_keeps_storage() -> None:
    weights = parameters()
    snapshot = Snapshot(weights)
    for w in weights:
        w.data += 1.0
    before = [w.detach().clone() for w in weights]
    places = [w.data_ptr() for w in weights]
    with pytest.raises(RuntimeError, match="inside"), snapshot.swapped():
        assert all(torch.equal(w, t) for w, t in zip(weights, snapshot.tensors, strict=True))
        raise RuntimeError("inside")
    assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))
    assert [w.data_ptr() for w in weights] == places


def test_a_graph_survives_the_exchange() -> None:
    weight = nn.Parameter(torch.tensor([2.0]))
    loss = (weight * weight * torch.tensor([3.0])).sum()
    with exchanged([weight], [torch.tensor([100.0])]):
        assert float(weight.detach()) == 100.0
    loss.backward()
    assert weight.grad is not None
    assert float(weight.grad) == 12.0


def test_snapshot_is_not_a_view_of_the_weights() -> None:
    weights = parameters()
    snapshot = Snapshot(weights)
    weights[0].data.fill_(7.0)
    assert not torch.equal(snapshot.tensors[0], weights[0])


@pytest.mark.parametrize("decay", [-0.1, 1.1, float("nan")])
def test_decay_outside_the_unit_interval_is_refused(decay: float) -> None:
    with pytest.raises(UserError, match="decay"):
        Snapshot(parameters()).update(decay)


def test_weights_in_a_wrapper_have_fingerprints() -> None:
    layer = nn.Linear(2, 2, bias=False)
    numbers, scales = torch.ones(2, 2), torch.ones(2, 2)
    layer.weight = nn.Parameter(TwoTensor(numbers, scales))
    before = base_fingerprints({"one": layer})
    assert before == base_fingerprints({"one": layer})
    scales[0, 0] = 2.0
    assert before != base_fingerprints({"one": layer})
