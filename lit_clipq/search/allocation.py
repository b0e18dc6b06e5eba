"""Choose one offer for each of many layers, so that costs are least and sizes fit a budget."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_STEPS = 2**17  # of a budget that is too fine to be counted exactly


@dataclass(frozen=True)
class Allocation:
    """Which offer each layer takes."""

    choice: tuple[int, ...]
    """Number of the offer, by layer."""
    cost: float
    """Sum of the costs of what was chosen."""
    size: int
    """Sum of the sizes of what was chosen, at most the budget."""
    bound: float
    """No choice within the budget costs less; equal to `cost` where the budget was counted exactly."""


def allocate(
    costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int, *, steps: int = _STEPS
) -> Allocation:
    """Minimise `sum_l costs[l][x_l]` over choices x with `sum_l sizes[l][x_l] <= budget`, by dynamic programming.

    What an offer takes beyond its layer's smallest one is counted in steps of the greatest common divisor, and the
    result is exact, if the budget has no more than `steps` of them. Else it is counted in `steps` coarser ones: rounded
    up the budget is kept, and with all of them rounded down the same programme tells what no choice can be better than.

    Args:
        costs: For each layer the cost of each of its offers, finite.
        sizes: For each layer the size of each of its offers.
        budget: Largest sum of sizes.
        steps: How finely the budget is counted.

    Raises:
        ValueError: If the budget is below the sum of the smallest sizes.

    Example:
        >>> allocate([[9.0, 1.0], [5.0, 0.0]], [[2, 8], [2, 4]], budget=10)
        Allocation(choice=(1, 0), cost=6.0, size=10, bound=6.0)
    """
    least = [min(offers) for offers in sizes]
    slack = budget - sum(least)
    if slack < 0:
        raise ValueError(f"expected a budget of at least {sum(least)}, got {budget}")
    more = [[size - smallest for size in offers] for offers, smallest in zip(sizes, least, strict=True)]
    divisor = math.gcd(*(m for offers in more for m in offers)) or 1
    unit = divisor if slack // divisor <= steps else -(-slack // steps)
    capacity = slack // unit
    choice, cost = _programme(costs, [[-(-m // unit) for m in offers] for offers in more], capacity)
    bound = cost
    if unit != divisor:
        bound = _programme(costs, [[m // unit for m in offers] for offers in more], capacity)[1]
    return Allocation(
        tuple(choice), cost, sum(offers[x] for offers, x in zip(sizes, choice, strict=True)), min(bound, cost)
    )


def _programme(
    costs: Sequence[Sequence[float]], weights: Sequence[Sequence[int]], capacity: int
) -> tuple[list[int], float]:
    """Solve it for weights in whole steps; of equal costs the lighter offer."""
    best = np.zeros(capacity + 1)  # least cost of the layers so far within 0 .. capacity steps
    taken = []
    for offered, heavy in zip(costs, weights, strict=True):
        order = sorted(range(len(offered)), key=lambda x: (heavy[x], offered[x]))
        table = np.full((len(order), capacity + 1), np.inf)
        for row, x in enumerate(order):
            if heavy[x] <= capacity:
                table[row, heavy[x] :] = best[: capacity + 1 - heavy[x]] + offered[x]
        rows = table.argmin(axis=0)
        taken.append((order, rows.astype(np.int16)))
        best = table[rows, np.arange(capacity + 1)]
    choice, left = [], capacity
    for (order, rows), heavy in zip(reversed(taken), reversed(list(weights)), strict=True):
        x = order[rows[left]]
        choice.append(x)
        left -= heavy[x]
    return choice[::-1], float(best[capacity]) if costs else 0.0
