from __future__ import annotations

import pytest
import torch

from dgpo.core import Groups
from oracles.toy import run_processes

MIXED = Groups(torch.tensor([1, 0, 1, 0, 2, 2]), size=2, count=3)
X = torch.tensor([1.0, 2.0, 3.0, 5.0, 7.0, 7.0])


def test_sums_means_and_each():
    assert MIXED.sum(X).tolist() == [7, 4, 14]
    assert MIXED.mean(X).tolist() == [3.5, 2, 7]
    assert MIXED.std(X).tolist() == [1.5, 1, 0]  # population
    assert MIXED.each(torch.tensor([10, 20, 30])).tolist() == [20, 10, 20, 10, 30, 30]
    assert Groups.contiguous(2, 3).index.tolist() == [0, 0, 0, 1, 1, 1]


def test_each_gives_one_noise_to_a_group():
    noise = torch.randn(3, 2, 4)
    shared = MIXED.each(noise)
    assert shared.shape == (6, 2, 4)
    assert torch.equal(shared[0], shared[2]) and torch.equal(shared[1], noise[0])


def test_normalize_by_group_and_by_batch():
    group = MIXED.normalize(X, "group")
    expected = torch.tensor([-1, -1.5, 1, 1.5, 0, 0]) / torch.tensor([1, 1.5, 1, 1.5, 1, 1])
    torch.testing.assert_close(group, expected, rtol=2e-4, atol=0)
    batch = MIXED.normalize(X, "batch")
    expected = torch.tensor([-1, -1.5, 1, 1.5, 0, 0]) / (
        X.std(unbiased=False) + 1e-4 * (6.5 / 6) ** 0.5
    )
    torch.testing.assert_close(batch, expected)
    for a in (group, batch):
        torch.testing.assert_close(MIXED.sum(a), torch.zeros(3))
    with pytest.raises(ValueError, match="'global'"):
        MIXED.normalize(X, "global")  # pyright: ignore


@pytest.mark.parametrize("scale", ["group", "batch"])
@pytest.mark.parametrize("unit", [2.0**-14, 1e-4, 1e-30, 1e20, 1e38])
def test_the_unit_of_the_rewards_does_not_matter(scale, unit):
    x = torch.tensor([0.0, 0.2, 0.4, 1.0, 0.5, 0.51])
    groups = Groups.contiguous(2, 3)
    found = groups.normalize(unit * x, scale)
    assert found.dtype == torch.float32 and groups.std(unit * x).isfinite().all()
    torch.testing.assert_close(found, groups.normalize(x, scale), rtol=1e-5, atol=1e-6)
    if unit == 2.0**-14:
        assert torch.equal(found, groups.normalize(x, scale))


def test_eps_damps_a_group_whose_rewards_hardly_differ_beside_the_others():
    x = torch.tensor([0.0, 2.0, 0.0, 2e-4]).double()
    a = Groups.contiguous(2, 2).normalize(x, eps=1e-4)
    within = 0.5**0.5  # of deviations 1 and 1e-4
    expected = torch.tensor([-1, 1, -1e-4, 1e-4]) / torch.tensor([1, 1, 1e-4, 1e-4]).add(
        1e-4 * within
    )
    torch.testing.assert_close(a, expected.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.bfloat16])
def test_spread_is_exact(dtype):
    x = torch.tensor([0, -0.0, 3, 3, 1, 2]).to(dtype)
    assert Groups.contiguous(3, 2).spread(x).tolist() == [False, False, True]


def test_spread_sees_the_last_bit():
    x = torch.full((48,), 0.1, dtype=torch.float64)
    x[20] = torch.nextafter(x[20], torch.tensor(1.0).double())
    assert Groups.contiguous(3, 16).spread(x).tolist() == [False, True, False]
    x = torch.tensor([1e300, 1e300, -1.0, 1.0], dtype=torch.float64)
    assert Groups.contiguous(2, 2).spread(x).tolist() == [False, True]


def test_a_constant_group_has_no_advantage_though_its_mean_rounds():
    x = torch.full((24,), 0.1)
    groups = Groups.contiguous(1, 24)
    assert (x - groups.each(groups.mean(x))).abs().max() > 0
    assert torch.equal(groups.normalize(x), torch.zeros(24))


def test_subset_compacts_numbers_and_keeps_the_size():
    part = MIXED.subset(torch.tensor([5, 0, 4]))
    assert part.index.tolist() == [1, 0, 1]
    assert (part.size, part.count, part.reduce) == (2, 2, MIXED.reduce)
    assert MIXED.subset(torch.tensor([0, 2, 4, 5])).mean(X[[0, 2, 4, 5]]).tolist() == [2, 7]


def test_statistics_of_a_part_of_a_group_are_refused():
    part = MIXED.subset(torch.tensor([0, 2, 4]))
    assert part.sum(X[[0, 2, 4]]).tolist() == [4, 7]
    for statistic in (part.mean, part.std, part.normalize):
        with pytest.raises(ValueError, match="group 1 has 1 of its 2 samples"):
            statistic(X[[0, 2, 4]])


@pytest.mark.parametrize("scale", ["group", "batch"])
def test_processes_agree_on_every_statistic(scale):
    """Groups 1 and 2 are cut by the border between the processes; group 2 is constant."""
    index = torch.tensor([0, 0, 0, 1, 2, 2, 1, 1, 2])
    x = torch.tensor([1.0, 2, 4, 8, 0.1, 0.1, 3, 3, 0.1]).double()
    whole = Groups(index, 3, 3)
    shares = torch.arange(9).split([5, 4])

    def body(rank, reduce):
        groups = Groups(index[shares[rank]], 3, 3, reduce)
        part = x[shares[rank]]
        kept = groups.subset(groups.each(groups.spread(part)).nonzero()[:, 0])
        return groups.normalize(part, scale), groups.spread(part), kept

    (first, spread, kept_first), (second, other, kept_second) = run_processes(body, 2)
    torch.testing.assert_close(torch.cat([first, second]), whole.normalize(x, scale))
    assert spread.tolist() == other.tolist() == [True, True, False]
    assert kept_first.count == kept_second.count == 2
    assert kept_first.index.tolist() == [0, 0, 0, 1] and kept_second.index.tolist() == [1, 1]


def test_processes_number_the_kept_groups_alike_when_their_rows_differ():
    index = torch.tensor([0, 1, 2, 2])

    def body(rank, reduce):
        groups = Groups(index[2 * rank : 2 * rank + 2], 2, 3, reduce)
        return groups.subset(torch.tensor([1]))  # groups 1 and 2 remain, one in each process

    first, second = run_processes(body, 2)
    assert (first.index.tolist(), second.index.tolist()) == ([0], [1])


@pytest.mark.parametrize(
    ("index", "size", "count"),
    [
        (torch.tensor([0, 3]), 2, 3),
        (torch.tensor([-1, 0]), 2, 3),
        (torch.tensor([0.0, 1.0]), 2, 3),
        (torch.tensor([[0, 1]]), 2, 3),
        (torch.tensor([0, 1]), 0, 3),
    ],
)
def test_impossible_groups_are_refused(index, size, count):
    with pytest.raises(ValueError, match="got"):
        Groups(index, size, count)


def test_wrong_lengths_are_refused():
    for call in (MIXED.sum, MIXED.mean, MIXED.each, MIXED.spread, MIXED.normalize):
        with pytest.raises(ValueError, match="rows"):
            call(torch.zeros(5))


def test_rank_places_the_samples_of_each_group_and_equals_in_their_order():
    groups = Groups(torch.tensor([1, 0, 1, 0, 1, 0]), 3, 2)
    x = torch.tensor([2.0, 5.0, 3.0, 5.0, 2.0, 7.0])
    assert groups.rank(x).tolist() == [1, 1, 0, 2, 2, 0]
    assert groups.rank(-x).tolist() == [0, 0, 2, 1, 1, 2]
    assert Groups(torch.tensor([2, 2]), 2, 4).rank(torch.tensor([0.0, 1.0])).tolist() == [1, 0]


def test_rank_needs_whole_groups_in_one_process():
    groups = Groups(torch.tensor([0, 0, 1]), 2, 2, reduce=lambda x: 2 * x)
    with pytest.raises(ValueError, match="whole groups of 2"):
        groups.rank(torch.zeros(3))
