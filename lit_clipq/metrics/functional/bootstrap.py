"""How sure a difference between two runs over the same samples is."""

from typing import NamedTuple

import torch
from torch import Tensor

_DRAWS_IN_MEMORY = 2**21


class BootstrapInterval(NamedTuple):
    """A difference of two means with its percentile interval."""

    difference: float
    low: float
    high: float


def paired_bootstrap(
    float_scores: Tensor,
    quantized_scores: Tensor,
    clusters: Tensor,
    samples: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> BootstrapInterval:
    """Percentile interval of mean(quantized) - mean(float) over resampled pictures.

    The samples of one picture (its five captions) are not independent, so pictures are drawn with replacement, as many
    as there are, each with all its samples. With D_c the summed difference and n_c the number of samples of picture c,
    a resample gives sum(D_c) / sum(n_c). (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13;
    Field and Welsh, Bootstrapping clustered data, 2007.)

    Args:
        float_scores: float (n,), scores of the float run.
        quantized_scores: float (n,), scores of the same samples in the same order.
        clusters: int64 (n,), picture of each sample.
        samples: number of resamples.
        seed: seed of the draws; equal seeds give equal intervals.
        confidence: probability mass of the interval, in (0, 1).

    Returns:
        Difference (negative: the quantized run is worse) and the interval's ends, as fractions like the scores.

    Raises:
        ValueError: Lengths differ or are zero, or an option is out of range.

    Example:
        >>> one, zero = torch.ones(4), torch.zeros(4)
        >>> tuple(paired_bootstrap(one, zero, torch.arange(4), samples=10))
        (-1.0, -1.0, -1.0)
    """
    if not (len(float_scores) == len(quantized_scores) == len(clusters) > 0):
        raise ValueError(
            "expected as many float scores, quantized scores and clusters, at least one; got "
            f"{len(float_scores)}, {len(quantized_scores)} and {len(clusters)}."
        )
    if samples < 1 or not 0 < confidence < 1:
        raise ValueError(f"expected samples >= 1 and 0 < confidence < 1, got {samples} and {confidence}.")
    change = quantized_scores.detach().cpu().double() - float_scores.detach().cpu().double()
    distinct, cluster, sizes = torch.unique(clusters.cpu(), return_inverse=True, return_counts=True)
    sums = torch.zeros(len(distinct), dtype=torch.float64).index_add(0, cluster, change)  # D_c
    sizes = sizes.double()  # n_c
    means = _resampled_means(sums, sizes, samples, torch.Generator().manual_seed(seed))
    tail = (1 - confidence) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return BootstrapInterval(float(sums.sum() / sizes.sum()), low, high)


def _resampled_means(sums: Tensor, sizes: Tensor, samples: int, generator: torch.Generator) -> Tensor:
    """Ratio of summed `sums` to summed `sizes` in each resample, float64 (samples,)."""
    clusters = len(sums)
    rows = max(1, _DRAWS_IN_MEMORY // clusters)
    means = []
    for start in range(0, samples, rows):
        shape = (min(rows, samples - start), clusters)
        drawn = torch.randint(clusters, shape, generator=generator)
        means.append(sums[drawn].sum(1) / sizes[drawn].sum(1))
    return torch.cat(means)
