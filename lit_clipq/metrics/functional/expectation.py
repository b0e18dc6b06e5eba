"""Hits among the first k when equal scores are put in random order, and their mean, without rounding on the way."""

from fractions import Fraction
from math import comb

import torch
from torch import Tensor


def expected_hits(better: Tensor, tied: Tensor, relevant: Tensor | int, k: int) -> Tensor:
    r"""Probability that a relevant item is among the first k when ties are ordered at random.

    With g items strictly better than the best relevant one and a group of e items tied with it, r of them relevant,
    s = clamp(k - g, 0, e) items of the group are among the first k, and none of them is relevant with the
    hypergeometric probability C(e - r, s) / C(e, s). So the expected hit is 1 - C(e - r, s) / C(e, s), which for r = 1
    is clamp((k - g) / e, 0, 1).

    Args:
        better: int64 (n,), g of each query.
        tied: int64 (n,), e of each query, itself included (>= 1).
        relevant: int64 (n,) or one number for all, r of each query (1 <= r <= e).
        k: number of items looked at.

    Returns:
        float64 (n,) on the CPU, each value the exact probability rounded once.

    Example:
        >>> expected_hits(torch.tensor([0, 1]), torch.tensor([1, 4]), 1, k=2).tolist()
        [1.0, 0.25]
    """
    better, tied = better.cpu(), tied.cpu()
    relevant = relevant.cpu() if isinstance(relevant, Tensor) else torch.full_like(tied, relevant)
    slots = torch.minimum((k - better).clamp(min=0), tied)
    cases, case = torch.unique(torch.stack([slots, tied, relevant], dim=1), dim=0, return_inverse=True)
    values = [_hit_probability(*row) for row in cases.tolist()]
    return torch.tensor(values, dtype=torch.float64)[case]


def _hit_probability(slots: int, tied: int, relevant: int) -> float:
    if slots == 0:
        return 0.0
    orders = comb(tied, slots)
    return (orders - comb(tied - relevant, slots)) / orders  # the quotient of two integers is rounded once


def exact_mean(values: Tensor) -> float:
    """Mean of float64 values, rounded once: equal values have exactly their own value as mean.

    Args:
        values: float64 (n,), n >= 1, finite.

    Example:
        >>> exact_mean(torch.full((3,), 0.1, dtype=torch.float64))
        0.1
    """
    distinct, counts = torch.unique(values, return_counts=True)
    terms = (Fraction(value) * count for value, count in zip(distinct.tolist(), counts.tolist(), strict=True))
    return float(sum(terms, Fraction(0)) / len(values))
