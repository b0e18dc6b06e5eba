"""Paired bootstrap: against the exact distribution over all resamples, and its invariants."""

from itertools import product

import pytest
import torch

from lit_clipq.metrics import paired_bootstrap
from lit_clipq.metrics.functional import bootstrap


def every_resample(before, after, clusters):
    """Difference of means in each of the C^C equally likely resamples of C pictures, by loops."""
    names = sorted(set(clusters))
    differences = []
    for drawn in product(names, repeat=len(names)):
        first = [value for name in drawn for value, c in zip(before, clusters, strict=True) if c == name]
        second = [value for name in drawn for value, c in zip(after, clusters, strict=True) if c == name]
        differences.append(sum(second) / len(second) - sum(first) / len(first))
    return sorted(differences)


def scores(pictures, seed=0, captions=5):
    generator = torch.Generator().manual_seed(seed)
    before = torch.rand(pictures * captions, generator=generator, dtype=torch.float64)
    after = before - torch.rand(pictures, generator=generator, dtype=torch.float64).repeat_interleave(captions)
    return before, after, torch.arange(pictures).repeat_interleave(captions)


def test_interval_agrees_with_the_exact_distribution_over_all_resamples():
    generator = torch.Generator().manual_seed(3)
    before, after = torch.rand(2, 14, generator=generator, dtype=torch.float64)
    clusters = torch.tensor([4, 9, 4, 2, 2, 4, 7, 9, 4, 0, 7, 2, 4, 4])  # pictures of unequal size, in no order
    exact = every_resample(before.tolist(), after.tolist(), clusters.tolist())
    ours = paired_bootstrap(before, after, clusters, samples=100_000, confidence=0.9)
    assert ours.difference == pytest.approx(after.mean().item() - before.mean().item(), abs=1e-14)
    # where our ends stand in the exact distribution: 0.05 and 0.95, up to the noise of the draws
    for end, mass in ((ours.low, 0.05), (ours.high, 0.95)):
        below = sum(value < end - 1e-12 for value in exact) / len(exact)
        upto = sum(value <= end + 1e-12 for value in exact) / len(exact)
        assert below - 0.004 <= mass <= upto + 0.004


def test_captions_of_one_picture_are_drawn_together():
    before, after, clusters = scores(40)
    together = paired_bootstrap(before, after, clusters)
    apart = paired_bootstrap(before, after, torch.arange(len(before)))
    assert together.high - together.low > 1.5 * (apart.high - apart.low)
    assert together.low < together.difference < together.high


def test_equal_seeds_give_equal_intervals_and_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    runs = [paired_bootstrap(*scores(30), seed=seed) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    assert torch.equal(state, torch.get_rng_state())


def test_memory_chunks_do_not_change_the_interval(monkeypatch):
    whole = paired_bootstrap(*scores(30), samples=500)
    monkeypatch.setattr(bootstrap, "_DRAWS_IN_MEMORY", 30 * 7)
    chunked = paired_bootstrap(*scores(30), samples=500)
    assert (chunked.low, chunked.high) == pytest.approx((whole.low, whole.high), abs=1e-12)


def test_equal_scores_give_no_difference_at_all():
    before, _, clusters = scores(10)
    assert tuple(paired_bootstrap(before, before, clusters)) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("change", [{"samples": 0}, {"confidence": 1.0}])
def test_options_out_of_range_are_refused(change):
    with pytest.raises(ValueError, match="samples >= 1"):
        paired_bootstrap(*scores(3), **change)


def test_unpaired_scores_are_refused():
    with pytest.raises(ValueError, match="got 3, 2 and 3"):
        paired_bootstrap(torch.ones(3), torch.ones(2), torch.arange(3))
