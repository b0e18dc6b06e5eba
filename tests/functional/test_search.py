"""Coarse-to-fine search on losses that are known in full."""

import pytest
import torch

from lit_clipq.functional.search import (
    FULL_GRID,
    LINEAR_ROUNDS,
    PRODUCT_ROUNDS,
    Round,
    coarse_to_fine,
    linear_multipliers,
)

COUNT, PROBLEMS = 100, 7
EVERYTHING = (0, COUNT - 1)


def rippled(seed=0, height=0.3):
    """Losses (COUNT, PROBLEMS) with a valley and ripples."""
    generator = torch.Generator().manual_seed(seed)
    bottom = torch.randint(5, 95, (PROBLEMS,), generator=generator)
    valley = (torch.arange(COUNT)[:, None] - bottom).double().square() / 1000
    return valley + height * torch.rand(COUNT, PROBLEMS, generator=generator, dtype=torch.float64)


def looking_up(losses, calls=None):
    def evaluate(index):
        if calls is not None:
            calls.append(index)
        return losses.gather(0, index[None])[0]

    return evaluate


def everywhere(value=0):
    return torch.full((PROBLEMS,), value, dtype=torch.int64)


def test_the_full_grid_finds_the_best_of_each_problem():
    losses = rippled()
    assert torch.equal(coarse_to_fine(looking_up(losses), COUNT, everywhere(), Round(reach=None)), losses.argmin(0))


@pytest.mark.parametrize("spacing", [3, 10])
def test_a_smooth_valley_needs_few_looks(spacing):
    losses, calls = rippled(height=0), []
    found = coarse_to_fine(looking_up(losses, calls), COUNT, everywhere(50), Round(spacing), span=EVERYTHING)
    assert torch.equal(found, losses.argmin(0))
    assert len(calls) <= 3 + COUNT / spacing + spacing + 2


def test_more_peaks_find_a_ripple_beside_the_second_best():
    losses = torch.ones(COUNT, 1, dtype=torch.float64)
    losses[21], losses[61], losses[62] = 0.5, 0.6, 0.1  # 1, 11, 21 ... are looked at with a spacing of 10 from 1
    for peaks, best in ((1, 21), (2, 62)):
        found = coarse_to_fine(
            looking_up(losses), COUNT, torch.tensor([0]), Round(10, peaks=peaks), span=(-4, COUNT - 1)
        )
        assert found.item() == best


def test_the_finalists_are_decided_by_the_second_look():
    exact = rippled()
    noisy, calls = exact + 0.02 * rippled(1), []
    round_ = Round(reach=None, finalists=5)
    found = coarse_to_fine(looking_up(noisy), COUNT, everywhere(), round_, recheck=looking_up(exact, calls))
    kept = torch.cat([everywhere()[None], noisy.argsort(dim=0)[:5]])
    assert torch.equal(found, kept.gather(0, exact.gather(0, kept).argmin(0, keepdim=True))[0])
    assert len(calls) == 6


@pytest.mark.parametrize("start", [0, 50, 99])
def test_reach_stays_around_the_start_and_inside_of_the_grid(start):
    losses = rippled()
    found = coarse_to_fine(looking_up(losses), COUNT, everywhere(start), Round(reach=3))
    low, high = max(0, start - 3), min(COUNT, start + 4)
    assert torch.equal(found, losses[low:high].argmin(0) + low)


@pytest.mark.parametrize("round_", [Round(), Round(reach=None), Round(3, 3, finalists=4)])
@pytest.mark.parametrize("span", [None, EVERYTHING])
def test_the_start_is_never_left_for_something_worse_or_equal(round_, span):
    losses = rippled()
    start = torch.randint(0, COUNT, (PROBLEMS,), generator=torch.Generator().manual_seed(3))
    found = coarse_to_fine(looking_up(losses), COUNT, start, round_, span=span, recheck=looking_up(losses))
    assert bool((losses.gather(0, found[None]) <= losses.gather(0, start[None])).all())
    flat = looking_up(torch.zeros_like(losses))
    assert torch.equal(coarse_to_fine(flat, COUNT, start, round_, span=span, recheck=flat), start)


def test_nan_is_never_chosen():
    losses = rippled()
    losses[::2] = torch.nan
    found = coarse_to_fine(looking_up(losses), COUNT, everywhere(), Round(reach=None))
    assert bool((found % 2 == 1).all())


@pytest.mark.parametrize(
    "options", [{"sample": 0}, {"spacing": 0}, {"peaks": 0}, {"finalists": 0}, {"recheck": 0}, {"reach": -1}]
)
def test_impossible_rounds_are_refused(options):
    with pytest.raises(ValueError, match="at least 1"):
        Round(**options)


def test_the_paper_has_three_rounds_over_everything():
    assert len(FULL_GRID) == 3
    assert all(r.reach is None and r.sample == r.recheck == 1 for r in FULL_GRID)
    assert all(r.reach for r in (*LINEAR_ROUNDS, *PRODUCT_ROUNDS))


def test_multipliers_span_the_range_and_hold_one():
    factors = linear_multipliers(100, 0.01, 1.2)
    assert (factors[0].item(), factors[-1].item()) == pytest.approx((0.01, 1.2))
    assert int((factors == 1).sum()) == 1
    assert bool((factors.diff() > 0).all())
    assert 1.0 not in linear_multipliers(10, 0.1, 0.9)
