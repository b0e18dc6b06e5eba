"""Cosine distributions against transcriptions of their definitions."""

import math

import numpy as np
import pytest
import torch

from lit_clipq.analysis.cosine import (
    BINS,
    PairCosines,
    density,
    describe_cosines,
    pair_cosines,
    rank_correlation,
    wasserstein,
)
from lit_clipq.errors import DataError


def samples(n=400, seed=0, ties=False):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator) * 0.2
    return (x * 20).round() / 20 if ties else x


@pytest.mark.parametrize("ties", [False, True])
def test_rank_correlation_is_pearsons_of_mean_ranks(ties):
    a, b = samples(seed=0, ties=ties), samples(seed=1, ties=ties) + samples(seed=0)

    def ranks(x):
        return np.array([(x < v).sum() + ((x == v).sum() + 1) / 2 for v in x])

    expected = np.corrcoef(ranks(a.double().numpy()), ranks(b.double().numpy()))[0, 1]
    assert rank_correlation(a, b) == pytest.approx(expected, abs=1e-12)
    assert rank_correlation(a, 3 * a + 1) == pytest.approx(1)
    assert rank_correlation(a, -a) == pytest.approx(-1)
    assert rank_correlation(a, torch.ones_like(a)) is None


def test_wasserstein_distance_is_the_area_between_the_distribution_functions():
    a, b = samples(seed=2), samples(seed=3) * 1.5 + 0.1
    places = np.sort(np.concatenate([a.double().numpy(), b.double().numpy()]))
    below = [np.searchsorted(np.sort(x.double().numpy()), places[:-1], side="right") / len(x) for x in (a, b)]
    expected = (np.abs(below[0] - below[1]) * np.diff(places)).sum()
    assert wasserstein(a, b) == pytest.approx(expected, rel=1e-9)
    assert wasserstein(a, a + 0.25) == pytest.approx(0.25)
    assert wasserstein(a, a) == 0
    with pytest.raises(ValueError, match="same size"):
        wasserstein(a, b[:-1])


def test_a_density_integrates_to_one_and_counts_bins():
    values = samples(ties=True)
    found = density(values)
    assert sum(found) * 2 / BINS == pytest.approx(1, abs=1e-4)
    counts = np.histogram(values.double().numpy(), BINS, (-1, 1))[0]
    assert np.allclose(found, counts / len(values) * BINS / 2, atol=1e-6)


def test_matched_pairs_are_those_of_the_data_and_others_never():
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(7, 5, generator=generator), torch.randn(9, 5, generator=generator) * 3
    pairs = torch.tensor([[t, t % 7] for t in range(9)])
    found = pair_cosines(images, texts, pairs, unmatched_per_image=100)
    matrix = np.array([[torch.cosine_similarity(i, t, dim=0).item() for t in texts] for i in images])
    own = {(t % 7, t) for t in range(9)}
    assert np.allclose(found.matched, [matrix[t % 7, t] for t in range(9)], atol=1e-6)
    others = sorted(matrix[i, t] for i in range(7) for t in range(9) if (i, t) not in own)
    assert np.allclose(np.sort(found.unmatched.numpy()), others, atol=1e-6)


def test_the_choice_of_pairs_depends_on_numbers_alone():
    pairs = torch.arange(50)[:, None].repeat(1, 2)
    one, other = (torch.randn(50, 4, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    first = pair_cosines(one, one, pairs, unmatched_per_image=5)
    assert len(first.unmatched) == 250
    assert len(pair_cosines(other, other, pairs, unmatched_per_image=5).unmatched) == 250
    longer = pair_cosines(one * 2, one * 5, pairs, unmatched_per_image=5)
    # lengths divide out but for rounding
    torch.testing.assert_close(longer.unmatched, first.unmatched, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("texts", "pairs"), [(1, [[0, 0]]), (3, [])])
def test_no_pairs_is_an_error(texts, pairs):
    with pytest.raises(DataError, match="matched"):
        pair_cosines(torch.ones(1, 2), torch.ones(texts, 2), torch.tensor(pairs, dtype=torch.int64).view(-1, 2))


def test_the_description_compares_pair_by_pair():
    a, b = PairCosines(samples(), samples(seed=1)), PairCosines(samples() - 0.05, samples(seed=2))
    told = describe_cosines(a, b)
    assert told["matched"]["mean_shift"] == pytest.approx(-0.05, abs=1e-6)
    assert told["matched"]["wasserstein"] == pytest.approx(0.05, abs=1e-6)
    assert told["matched"]["rank_correlation"] == pytest.approx(1)
    assert abs(told["unmatched"]["rank_correlation"]) < 0.2
    assert set(describe_cosines(a)["matched"]) == {"pairs", "float"}
    assert all(math.isfinite(x) for x in told["matched"]["quantized"]["density"])
    with pytest.raises(DataError, match="saw 400 and 399 matched"):
        describe_cosines(a, PairCosines(b.matched[:-1], b.unmatched))
