"""Bits under a budget against all choices there are."""

import itertools

import numpy as np
import pytest

from lit_clipq.search.allocation import allocate


def problem(seed, *, layers=6, offers=5, fine=False):
    random = np.random.default_rng(seed)
    scale = 1 if fine else 64
    sizes = [sorted(int(scale * s) for s in random.integers(1, 40, offers)) for _ in range(layers)]
    costs = [sorted(random.lognormal(0, 3, offers).tolist(), reverse=True) for _ in range(layers)]
    costs[0][-1] *= 3  # more bits are not always better
    return costs, sizes


def brute_force(costs, sizes, budget):
    best = min(
        (sum(c[x] for c, x in zip(costs, choice, strict=True)), choice)
        for choice in itertools.product(*(range(len(c)) for c in costs))
        if sum(s[x] for s, x in zip(sizes, choice, strict=True)) <= budget
    )
    return best[0]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 1.0])
def test_six_layers_are_allocated_as_brute_force_does(seed, share):
    costs, sizes = problem(seed)
    least, most = (sum(f(s) for s in sizes) for f in (min, max))
    budget = int(least + share * (most - least))
    found = allocate(costs, sizes, budget)
    assert found.cost == pytest.approx(brute_force(costs, sizes, budget), rel=1e-12)
    assert found.bound == found.cost
    assert found.cost == pytest.approx(sum(c[x] for c, x in zip(costs, found.choice, strict=True)))
    assert found.size == sum(s[x] for s, x in zip(sizes, found.choice, strict=True)) <= budget


@pytest.mark.parametrize("seed", range(6))
def test_a_budget_counted_coarsely_is_kept_and_says_how_far_from_the_best_it_may_be(seed):
    costs, sizes = problem(seed, fine=True)
    budget = int(0.6 * sum(map(max, sizes)))
    exact = brute_force(costs, sizes, budget)
    for steps in (3, 17, 50):
        found = allocate(costs, sizes, budget, steps=steps)
        assert found.size <= budget
        assert found.bound <= exact * (1 + 1e-12)
        assert exact <= found.cost * (1 + 1e-12)


def test_of_equal_costs_the_lighter_is_taken():
    assert allocate([[1.0, 1.0, 1.0]], [[8, 4, 6]], 100).choice == (1,)


def test_an_impossible_budget_is_refused():
    with pytest.raises(ValueError, match="expected a budget of at least 12, got 11"):
        allocate([[1.0, 2.0], [1.0, 2.0]], [[9, 4], [8, 9]], 11)
