"""Candidate scales and how to choose among them.

A candidate is a number, 0 .. count - 1, for each of C independent problems (the channels of a weight). Losses come as
tables (M, C): a row for each offer. Nothing here reads a value back from the device but `valley`.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

Evaluate = Callable[[Tensor], Tensor]


@lru_cache
def linear_multipliers(count: int, low: float = 0.01, high: float = 1.2) -> Tensor:
    """Return `count` factors from `low` to `high`, both included, float32; the one nearest to 1 is 1 exactly.

    So the min-max grid itself is a candidate, and a search from there never ends behind it. Every call returns the same
    tensor, which must not be written to.

    Example:
        >>> factors = linear_multipliers(100)
        >>> round(factors[0].item(), 4), factors[82].item(), round(factors[-1].item(), 4)
        (0.01, 1.0, 1.2)
    """
    factors = torch.linspace(low, high, count)
    if low <= 1 <= high:
        factors[(factors - 1).abs().argmin()] = 1
    return factors


def best_first(offers: Tensor, losses: Tensor) -> Tensor:
    """Return the offers (M, C) sorted for each problem by their losses (M, C); of equal losses the earlier offer.

    Example:
        >>> best_first(torch.tensor([[4], [5], [6]]), torch.tensor([[0.3], [0.1], [0.3]])).flatten().tolist()
        [5, 4, 6]
    """
    return offers.gather(0, losses.argsort(dim=0, stable=True))


def spaced(low: int, high: int, step: int) -> list[int]:
    """Return numbers from `low` to `high`, both included, `step` apart but for the last.

    Example:
        >>> spaced(2, 9, 3)
        [2, 5, 8, 9]
    """
    return sorted({*range(low, high + 1, step), high})


def around(centres: Tensor, reach: int, count: int) -> Tensor:
    """Return the numbers up to `reach` from each of the centres (K, C), within 0 .. count - 1, the centres first.

    Example:
        >>> around(torch.tensor([[5], [99]]), 1, 100).flatten().tolist()
        [5, 99, 4, 98, 6, 99]
    """
    offsets = sorted(range(-reach, reach + 1), key=abs)
    return torch.cat([centres + offset for offset in offsets]).clamp(0, count - 1)


def valley(losses: Tensor, slack: float, share: float = 0.02) -> tuple[int, int]:
    """Return the first and the last row of a table (M, C) that may hold the best candidate of a problem.

    A row may, where its loss is at most `slack` times the lowest of its problem, and does so for more than `share` of
    the problems. One row more on either side is taken, because the table leaves candidates out.

    Example:
        >>> losses = torch.tensor([9.0, 4.0, 1.1, 1.0, 1.3, 3.0])[:, None]
        >>> valley(losses, slack=1.2)
        (1, 4)
    """
    lowest = losses.amin(0, keepdim=True)
    near = losses <= torch.where(lowest > 0, slack * lowest, lowest)  # a cosine may round to below 0
    rows = (near.double().mean(1) > share).nonzero().flatten().tolist() or near.any(1).nonzero().flatten().tolist()
    return max(rows[0] - 1, 0), min(rows[-1] + 1, len(losses) - 1)


def coarse_to_fine(evaluate: Evaluate, count: int, start: Tensor, spacing: int = 10) -> Tensor:
    """Find the best candidate of each problem where losses are smooth: every n-th, then those around the best.

    Args:
        evaluate: Maps candidates int64 (C,) to losses (C,).
        count: Number of candidates.
        start: Candidates to begin from, int64 (C,).
        spacing: Of the first look.

    Returns:
        Candidates int64 (C,), with no larger loss than the start. Of equal losses the start wins.

    Example:
        >>> target = torch.tensor([3, 77])
        >>> coarse_to_fine(lambda index: (index - target).double() ** 2, 100, torch.tensor([50, 50])).tolist()
        [3, 77]
    """
    coarse = torch.tensor(spaced(0, count - 1, spacing), device=start.device)[:, None].expand(-1, len(start))
    best = _ranked(torch.cat([start[None], coarse]), evaluate)[:1]
    return _ranked(torch.cat([start[None], around(best, spacing - 1, count)]), evaluate)[0]


def _ranked(offers: Tensor, evaluate: Evaluate) -> Tensor:
    return best_first(offers, torch.stack([evaluate(offer) for offer in offers]))
