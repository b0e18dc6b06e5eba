"""Search over a grid of candidates, coarse to fine.

The objective of a scale is almost unimodal: rounding makes it ripple, but the valley is wide. So a few widely spaced
candidates find the valley and closer ones its bottom; early rounds make do with a sample of the data, the last one
takes all of it but looks around the best so far only.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Evaluate = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Round:
    """One search of every operand of a layer in turn."""

    steps: tuple[int, ...] = (1,)
    """Spacings, coarse to fine: the first covers the reach, each further one the gap around the best so far."""
    reach: int | None = None
    """How far from the best so far the first spacing looks; `None` is the whole grid."""
    sample: int = 1
    """Candidates are compared on every n-th unit of the data; 1 takes all."""
    alone: bool = False
    """Whether each operand is searched with the others in float: a start that does not depend on how bad the others'
    min-max grids are."""

    def __post_init__(self) -> None:
        if not self.steps or self.steps[-1] != 1 or list(self.steps) != sorted(set(self.steps), reverse=True):
            raise ValueError(f"expected spacings that fall to 1, got {self.steps}")
        if self.sample < 1 or (self.reach is not None and self.reach < 1):
            raise ValueError(f"expected a sample and a reach of at least 1, got {self.sample} and {self.reach}")


FULL_GRID = (Round(), Round(), Round())
"""Three rounds over every candidate and all data: the procedure of PTQ4ViT."""
COARSE_TO_FINE = (Round((10, 3, 1), None, 8, alone=True), Round((3, 1), 9, 4), Round((3, 1), 3, 1))
"""The default."""


def linear_multipliers(count: int, low: float = 0.01, high: float = 1.2) -> Tensor:
    """Return `count` factors from `low` to `high`, both included, float32."""
    return torch.linspace(low, high, count)


def coarse_to_fine(evaluate: Evaluate, count: int, start: Tensor, round_: Round) -> Tensor:
    """Find the best candidate of each of C independent problems.

    Args:
        evaluate: Maps candidate indices int64 (C,) to losses (C,). Under several ranks it returns the sum over ranks,
            so that all of them decide alike.
        count: Number of candidates.
        start: Indices to begin from, int64 (C,); the result has no larger loss than they.
        round_: Spacings and reach.

    Returns:
        Indices int64 (C,).

    Example:
        >>> target = torch.tensor([3, 77])
        >>> parabola = lambda index: (index - target).double() ** 2
        >>> coarse_to_fine(parabola, 100, torch.tensor([50, 50]), Round((10, 3, 1))).tolist()
        [3, 77]
    """
    best, loss = start.clone(), evaluate(start)
    reach = round_.reach
    for step in round_.steps:
        if reach is None:
            offers = [torch.full_like(best, i) for i in _covering(count, step)]
        else:
            around = [o for o in range(-reach, reach + 1) if o % step == 0 and o != 0]
            offers = [(best + o).clamp(0, count - 1) for o in around]
        for offer in offers:
            new = evaluate(offer)
            better = new < loss
            best, loss = torch.where(better, offer, best), torch.where(better, new, loss)
        reach = step - 1
    return best


def _covering(count: int, step: int) -> list[int]:
    """Return indices in 0 .. count - 1, `step` apart, the last one included."""
    return sorted({*range(step // 2, count, step), count - 1})
