"""Distances between a product and its quantized form, as sums over samples.

Every distance is a function of sums, so that parts of a calibration set, and ranks, add up to the whole exactly. Sums
run along the rows in the type of the values and go on in float64.
"""

from typing import Literal

import torch
from torch import Tensor

Distance = Literal["hessian", "l2", "l1", "cosine"]


def distance_sums(
    output: Tensor, target: Tensor, weight: Tensor | None, distance: Distance, *, axis: int, per_channel: bool
) -> Tensor:
    """Return the sums of a distance, float64 (*, S, channels), or (*, S, 1) over all channels.

    Args:
        output: Quantized products (*, *shape) under any number of grids; but for `cosine` it is overwritten by the
            (weighted) errors.
        target: Float product (*shape).
        weight: Weight of each squared or absolute error, broadcastable to `shape`; for `cosine` of each row, the last
            axis being 1, where channels are not kept apart.
        distance: `hessian` is sum w e^2, `l2` sum e^2, `l1` sum abs(e); `cosine` is the sum of 1 - cosine of each row,
            or per channel 1 - cosine of the channel over all rows. S is 3 for the last, else 1.
        axis: Axis of the channels, negative.
        per_channel: Whether channels are kept apart.
    """
    inner = range(-target.dim(), 0)
    rows = [d for d in inner if d != axis]
    if distance == "cosine":
        return _cosine_sums(output, target, weight, axis, rows, per_channel=per_channel)
    error = output.sub_(target)
    error = error.abs_() if distance == "l1" else error.square_()
    if weight is not None:
        error = error.mul_(weight)
    by_channel = error.sum(rows).double()[..., None, :]
    return by_channel if per_channel else by_channel.sum(-1, keepdim=True)


def distance_from_sums(sums: Tensor, distance: Distance) -> Tensor:
    """Return the distance (*, channels) that sums (*, S, channels) stand for."""
    if distance == "cosine" and sums.shape[-2] == 3:
        dot, own, other = sums.unbind(-2)
        return 1 - dot / (own * other).clamp(min=1e-300).sqrt()
    return sums.squeeze(-2)


def sums_of(distance: Distance, *, per_channel: bool) -> int:
    """Return S, how many sums a distance is made of."""
    return 3 if distance == "cosine" and per_channel else 1


def _cosine_sums(
    output: Tensor, target: Tensor, weight: Tensor | None, axis: int, rows: list[int], *, per_channel: bool
) -> Tensor:
    products = (output * target, output.square(), target.square().expand(output.shape))
    if per_channel:
        return torch.stack([x.sum(rows).double() for x in products], dim=-2)
    dot, own, other = (x.sum(axis) for x in products)
    unlike = 1 - dot / (own * other).clamp(min=1e-30).sqrt()
    if weight is not None:
        unlike = unlike * weight.squeeze(axis)
    return unlike.flatten(output.dim() - target.dim()).sum(-1, dtype=torch.float64)[..., None, None]
