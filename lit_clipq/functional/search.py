"""Search over a grid of candidates, coarse to fine.

The objective of a scale is almost unimodal: rounding makes it ripple, but the valley is wide. So a few widely spaced
candidates find the valley and closer ones its bottom; early rounds make do with few units of the data, later ones see
more of them but look around the best so far only.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Evaluate = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Round:
    """One search of every operand of a layer in turn."""

    spacing: int = 10
    """An operand's first search looks at every n-th candidate, ..."""
    peaks: int = 1
    """... then between it and its neighbours, for so many of the best."""
    reach: int | None = 3
    """How far from the best so far later searches look; `None` is the whole grid, in the first search too."""
    sample: int = 1
    """Candidates are compared on about every n-th unit of the data; 1 takes all."""
    finalists: int = 1
    """How many candidates are compared once more, ..."""
    recheck: int = 1
    """... on about every n-th unit."""

    def __post_init__(self) -> None:
        if min(self.spacing, self.peaks, self.sample, self.finalists, self.recheck) < 1 or (
            self.reach is not None and self.reach < 1
        ):
            raise ValueError(f"expected numbers of at least 1, got {self}")


@dataclass(frozen=True)
class Table:
    """One comparison of pairs of candidates: of the first operand (the weight) and of the last (the input).

    The objective of the last operand's scale is its minimum over the first's. A series of tables narrows it down to one
    pair; rounds go on from there. Alternating from anywhere else ends in the valley where it began.
    """

    spacing: int
    """Every n-th candidate of the first operand is tried."""
    sample: int = 1
    """About every n-th unit of the data is looked at."""
    channels: int = 1
    """About so many output channels are, evenly spread."""
    keep: int = 1
    """How many candidates of the last operand go on."""
    spread: int = 0
    """How far from them others join."""


FULL_GRID = (Round(reach=None),) * 3
"""Three rounds over every candidate and all data: the procedure of PTQ4ViT."""
LINEAR_ROUNDS = (Round(3, 3, 3, 8, 4, 4), Round(3, 3, 2, 8, 3, 4))
"""The default of layers with a weight."""
PRODUCT_ROUNDS = (Round(10, 1, 3, 4, 6, 1), Round(10, 1, 6, 4, 6, 1))
"""The default of products of two activations."""
TABLES = (Table(12, 32, 192, 1, 4), Table(4, 32, 256))
"""The default of layers with a weight."""


def linear_multipliers(count: int, low: float = 0.01, high: float = 1.2) -> Tensor:
    """Return `count` factors from `low` to `high`, both included, float32; the one nearest to 1 is 1 exactly.

    So the min-max grid itself is a candidate, and a search from there never ends behind it.

    Example:
        >>> factors = linear_multipliers(100)
        >>> round(factors[0].item(), 4), factors[82].item(), round(factors[-1].item(), 4)
        (0.01, 1.0, 1.2)
    """
    factors = torch.linspace(low, high, count)
    if low <= 1 <= high:
        factors[(factors - 1).abs().argmin()] = 1
    return factors


def coarse_to_fine(
    evaluate: Evaluate,
    count: int,
    start: Tensor,
    round_: Round,
    *,
    span: tuple[int, int] | None = None,
    recheck: Evaluate | None = None,
) -> Tensor:
    """Find the best candidate of each of C independent problems.

    Nothing is read back from the device: a decision is a few tensor operations on the losses.

    Args:
        evaluate: Maps candidate indices int64 (C,) to losses (C,). Under several ranks it returns the sum over ranks,
            so that all of them decide alike.
        count: Number of candidates.
        start: Indices to begin from, int64 (C,).
        round_: How to look.
        span: First and last candidate to look at if nothing is known of the problem yet, else `None`.
        recheck: Losses by which the finalists are compared, if not by `evaluate` again.

    Returns:
        Indices int64 (C,), with no larger loss than the start. Of equal losses the start wins: a channel that nothing
        depends on keeps it.

    Example:
        >>> target = torch.tensor([3, 77])
        >>> parabola = lambda index: (index - target).double() ** 2
        >>> coarse_to_fine(parabola, 100, torch.tensor([50, 50]), Round(), span=(0, 99)).tolist()
        [3, 77]
    """
    if round_.reach is None:
        offers = [torch.full_like(start, i) for i in range(count)]
    elif span is not None:
        coarse = [torch.full_like(start, i) for i in _covering(*span, round_.spacing)]
        peaks = _ranked([start, *coarse], evaluate)[: round_.peaks]
        offers = _around(peaks, round_.spacing // 2, count)
    else:
        offers = _around(start[None], round_.reach, count)
    if recheck is None:
        return _ranked([start, *offers], evaluate)[0]
    return _ranked([start, *_ranked(offers, evaluate)[: round_.finalists]], recheck)[0]


def _ranked(offers: list[Tensor], evaluate: Evaluate) -> Tensor:
    """Return the offers (C,) sorted for each problem by loss, the best first, (M, C); of equal losses the earlier."""
    order = torch.stack([evaluate(offer) for offer in offers]).argsort(dim=0, stable=True)
    return torch.stack(offers).gather(0, order)


def _around(centres: Tensor, reach: int, count: int) -> list[Tensor]:
    """Return the indices up to `reach` from each of the centres (P, C), the centres first."""
    return [(c + o).clamp(0, count - 1) for o in sorted(range(-reach, reach + 1), key=abs) for c in centres]


def _covering(low: int, high: int, step: int) -> list[int]:
    """Return indices in low .. high, `step` apart, the last one included."""
    return sorted({*range(low + step // 2, high + 1, step), high})
