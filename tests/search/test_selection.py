"""Choosing among candidates by losses that are known in full."""

import itertools

import pytest
import torch

from lit_clipq.search.selection import around, best_first, coarse_to_fine, linear_multipliers, spaced, valley

COUNT, PROBLEMS = 100, 7


def valleys(seed=0):
    """Losses (COUNT, PROBLEMS), a parabola each."""
    bottom = torch.randint(0, COUNT, (PROBLEMS,), generator=torch.Generator().manual_seed(seed))
    return (torch.arange(COUNT)[:, None] - bottom).double().square() / 1000


def looking_up(losses, calls=None):
    def evaluate(index):
        if calls is not None:
            calls.append(index)
        return losses.gather(0, index[None])[0]

    return evaluate


@pytest.mark.parametrize("spacing", [3, 10])
@pytest.mark.parametrize("seed", range(5))
def test_a_smooth_valley_needs_few_looks(spacing, seed):
    losses, calls = valleys(seed), []
    start = torch.full((PROBLEMS,), 50)
    assert torch.equal(coarse_to_fine(looking_up(losses, calls), COUNT, start, spacing), losses.argmin(0))
    assert len(calls) <= 3 + COUNT / spacing + 2 * spacing


def test_the_start_is_kept_unless_something_is_better():
    start = torch.randint(0, COUNT, (PROBLEMS,), generator=torch.Generator().manual_seed(1))
    flat = looking_up(torch.ones(COUNT, PROBLEMS, dtype=torch.float64))
    assert torch.equal(coarse_to_fine(flat, COUNT, start), start)
    lonely = torch.ones(COUNT, PROBLEMS, dtype=torch.float64)
    lonely[start, range(PROBLEMS)] = 0.5  # a hole that a coarse look misses
    assert torch.equal(coarse_to_fine(looking_up(lonely), COUNT, start), start)


def test_offers_are_sorted_for_each_problem_and_ties_keep_their_order():
    offers = torch.tensor([[1, 10], [2, 20], [3, 30], [4, 40]])
    losses = torch.tensor([[0.5, 0.1], [0.2, 0.1], [0.5, 0.3], [0.1, 0.1]])
    assert best_first(offers, losses).tolist() == [[4, 10], [2, 20], [1, 40], [3, 30]]


def test_a_valley_holds_the_best_of_nearly_all_problems():
    losses = torch.full((10, 200), 10.0)
    for problem in range(200):
        losses[3 + problem % 3, problem] = 1.0
    losses[9, 0] = 0.1  # one of 200
    assert valley(losses, slack=1.5) == (2, 6)
    assert valley(losses, slack=1.5, share=0.0) == (2, 9)


def test_a_valley_exists_where_the_lowest_loss_rounds_to_below_zero():
    losses = torch.tensor([0.5, -1.2e-6, 0.5, 0.5])[:, None]
    assert valley(losses, slack=1.4) == (0, 2)


def test_a_valley_at_the_border_stays_inside():
    assert valley(torch.arange(5.0)[:, None] + 1, slack=1.1) == (0, 1)
    assert valley(5 - torch.arange(5.0)[:, None], slack=1.1) == (3, 4)


def test_a_valley_exists_where_every_problem_has_its_own():
    losses = torch.ones(100, 100) + torch.rand(100, 100, generator=torch.Generator().manual_seed(0))
    losses.fill_diagonal_(0.1)
    assert valley(losses, slack=1.2, share=0.02) == (0, 99)


def test_neighbours_stay_inside_the_grid():
    assert around(torch.tensor([[0], [99]]), 2, COUNT).flatten().tolist() == [0, 99, 0, 98, 1, 99, 0, 97, 2, 99]


@pytest.mark.parametrize(("low", "high", "step"), [(0, 99, 4), (3, 3, 5), (0, 1, 10)])
def test_spaced_numbers_hold_both_ends(low, high, step):
    found = spaced(low, high, step)
    assert found[0] == low
    assert found[-1] == high
    assert all(0 < b - a <= step for a, b in itertools.pairwise(found))


@pytest.mark.parametrize("count", [2, 25, 100, 101])
def test_min_max_is_among_the_multipliers(count):
    factors = linear_multipliers(count)
    assert len(factors) == count
    assert (factors == 1).sum() == 1
    assert factors[0] == pytest.approx(0.01) or count == 2
    assert factors[-1] == pytest.approx(1.2) or count == 2
    assert (factors.diff() > 0).all()


def test_nan_is_never_the_best():
    offers, losses = torch.arange(4)[:, None], torch.tensor([torch.nan, 0.5, torch.nan, 0.2])[:, None]
    assert best_first(offers, losses)[:2].flatten().tolist() == [3, 1]
