"""Distances between a product and its quantized form, as sums over samples.

Every distance is a sum over rows, so that parts of a calibration set, and ranks, add up to the whole exactly. Sums run
along the rows in the type of the values and go on in float64.
"""

from typing import Literal

import torch
from torch import Tensor

Distance = Literal["hessian", "l2", "l1", "cosine"]


def distance_sums(
    output: Tensor,
    target: Tensor,
    weight: Tensor | None,
    distance: Distance,
    *,
    axis: int,
    per_channel: bool,
    projections: Tensor | None = None,
) -> Tensor:
    """Return the sums of a distance, float64 (*, columns): of each channel, or one over all of them.

    Args:
        output: Quantized products (*, *shape) under any number of grids; but for `cosine` it is overwritten by the
            (weighted) errors.
        target: Float product (*shape).
        weight: Weight of each squared or absolute error, broadcastable to `shape`; for `cosine` of each row, the axis
            of the channels being 1.
        distance: `hessian` is sum w e^2, `l2` sum e^2, `l1` sum abs(e); `cosine` is the sum of 1 - cosine of each row,
            along the channels of a projection. Kept apart are projections then: the cosine of a single channel over the
            rows would not see its gain.
        axis: Axis of the channels, negative.
        per_channel: Whether channels (for `cosine` projections) are kept apart.
        projections: 1 where a channel belongs to a projection, else 0, (channels, projections); `None` is one of all.
    """
    if distance == "cosine":
        unlike = _unlike(output.movedim(axis, -1), target.movedim(axis, -1), projections)  # (*, rows, projections)
        if weight is not None:
            unlike = unlike * weight.movedim(axis, -1)
        sums = unlike.sum(list(range(-target.dim(), -1)), dtype=torch.float64)
    else:
        error = output.sub_(target)
        error = error.abs_() if distance == "l1" else error.square_()
        if weight is not None:
            error = error.mul_(weight)
        sums = error.sum([d for d in range(-target.dim(), 0) if d != axis]).double()
    return sums if per_channel else sums.sum(-1, keepdim=True)


def _unlike(output: Tensor, target: Tensor, projections: Tensor | None) -> Tensor:
    """Return 1 - cosine along the last axis, within each projection: (*, projections)."""
    products = (output * target, output.square(), target.square())
    dot, own, other = (x.sum(-1, keepdim=True) if projections is None else x @ projections for x in products)
    return 1 - dot / (own * other).clamp(min=1e-30).sqrt()
