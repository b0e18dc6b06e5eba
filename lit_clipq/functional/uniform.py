"""Uniform affine quantization of b bits.

With scale S and zero point Z a value x has the code `q = clamp(round(x / S) + Z, qmin, qmax)` and the
reconstruction `S * (q - Z)`. Affine grids have codes 0 .. 2^b - 1, symmetric ones -2^(b-1) .. 2^(b-1) - 1 and Z = 0
(Jacob et al., arXiv 1712.05877).
"""

import torch
from torch import Tensor

from lit_clipq.functional.granularity import (
    Granularity,
    PerChannel,
    PerGroup,
    PerSample,
    PerTensor,
    PerToken,
    split_groups,
)

MIN_BITS, MAX_BITS = 2, 16


def code_range(bits: int, *, symmetric: bool) -> tuple[int, int]:
    """Return (qmin, qmax) of a grid of `bits` bits.

    Raises:
        ValueError: If `bits` is outside 2..16.

    Example:
        >>> code_range(8, symmetric=True), code_range(4, symmetric=False)
        ((-128, 127), (0, 15))
    """
    if not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"expected {MIN_BITS} to {MAX_BITS} bits, got {bits}")
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)


def affine_parameters(
    low: Tensor, high: Tensor, bits: int, *, symmetric: bool, restricted: bool = False
) -> tuple[Tensor, Tensor]:
    """Return (scale float32, zero point int32) of the grid that spans [low, high], widened to contain 0.

    Affine: S = (high - low) / (2^b - 1), Z = round(-low / S). Symmetric with c = max(|low|, |high|):
    S = 2 c / (2^b - 1), Z = 0, so that +c lies half a step outside the grid and is clipped; `restricted` takes
    S = c / (2^(b-1) - 1) instead, which represents +c exactly and gives up the most negative code.

    Args:
        low: Smallest values, any shape, finite.
        high: Largest values, same shape.
        bits: Width of the codes, 2 to 16.
        symmetric: Whether the grid mirrors around 0.
        restricted: Symmetric grids only: cover [-c, c] exactly.

    Raises:
        ValueError: For a width outside 2..16 or a range that is not finite.
    """
    qmin, qmax = code_range(bits, symmetric=symmetric)
    if not bool((low.isfinite() & high.isfinite()).all()):
        raise ValueError("expected finite ranges, got NaN or Inf; look for non-finite values in front of this grid")
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    if symmetric:
        bound = torch.maximum(-low, high)
        scale = bound / qmax if restricted else 2 * bound / (2**bits - 1)
    else:
        scale = (high - low) / (qmax - qmin)
    # A range that is empty, or so narrow that the reciprocal of its step overflows, is represented as 0.
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, torch.ones_like(scale), scale)
    zero_point = torch.zeros_like(scale) if symmetric else (-low / scale).round().clamp(qmin, qmax)
    return scale, zero_point.int()


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, granularity: Granularity
) -> Tensor:
    """Round `x` to its grid and back; shape and dtype of `x`, straight-through gradient inside the range.

    torch's fused operators do the work, except on a CPU without gradients: there four in-place passes give the same
    bits in a fifteenth of the time. The fused operators turn NaN into a number: check inputs that may hold one
    beforehand.

    Args:
        x: Values, floating point.
        scale: Step, float32, of the shape `granularity` names.
        zero_point: Code of 0, int32, shape of `scale`.
        qmin: Smallest code.
        qmax: Largest code.
        granularity: What shares a scale.
    """
    if x.dtype in (torch.float16, torch.bfloat16):
        return fake_quantize(x.float(), scale, zero_point, qmin, qmax, granularity).to(x.dtype)
    if x.is_cpu and not (torch.is_grad_enabled() and x.requires_grad):
        return _round_in_place(x, scale, zero_point, qmin, qmax, granularity)
    if isinstance(granularity, PerTensor):
        return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, qmin, qmax)
    if isinstance(granularity, PerChannel):
        axis = granularity.axis % x.dim()
        return torch.fake_quantize_per_channel_affine(x, scale, zero_point, axis, qmin, qmax)
    if isinstance(granularity, PerToken) and granularity.axis % x.dim() != x.dim() - 1:
        columns = x.movedim(granularity.axis, -1)
        scale, zero_point = (values.movedim(granularity.axis, -1) for values in (scale, zero_point))
        return fake_quantize(columns, scale, zero_point, qmin, qmax, PerToken()).movedim(-1, granularity.axis)
    rows = split_groups(x, granularity.size) if isinstance(granularity, PerGroup) else x
    rows = rows.flatten(1) if isinstance(granularity, PerSample) else rows
    flat = torch.fake_quantize_per_channel_affine(
        rows.reshape(-1, rows.shape[-1]), scale.reshape(-1), zero_point.reshape(-1), 0, qmin, qmax
    )
    return flat.reshape(x.shape)


def _round_in_place(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, granularity: Granularity
) -> Tensor:
    """Round without gradients: one copy, then four passes over it."""
    rows = split_groups(x, granularity.size) if isinstance(granularity, PerGroup) else x
    scale = broadcastable(scale, x, granularity)
    steps = rows.mul(1.0 / scale).round_()
    if zero_point.any():
        zero = broadcastable(zero_point, x, granularity)
        steps.clamp_(qmin - zero, qmax - zero) if zero.dim() else steps.clamp_(qmin - int(zero), qmax - int(zero))
    else:
        steps.clamp_(qmin, qmax)
    return steps.mul_(scale).reshape(x.shape)


def broadcastable(values: Tensor, x: Tensor, granularity: Granularity) -> Tensor:
    """View per-scale `values` so that they broadcast against `x` (against `split_groups(x)` for `PerGroup`)."""
    if isinstance(granularity, PerChannel):
        shape = [1] * x.dim()
        shape[granularity.axis] = -1
        return values.view(shape)
    return values


def to_codes(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, granularity: Granularity) -> Tensor:
    """Return the int32 codes of `x`, same shape; `from_codes` of them equals `fake_quantize` bit for bit."""
    rounded = fake_quantize(x, scale, zero_point, qmin, qmax, granularity)
    grouped = split_groups(rounded, granularity.size) if isinstance(granularity, PerGroup) else rounded
    steps = (grouped / broadcastable(scale, rounded, granularity)).round().reshape(x.shape)
    zero = broadcastable(zero_point, rounded, granularity)
    if isinstance(granularity, PerGroup):
        zero = zero.expand(*grouped.shape).reshape(x.shape)
    return steps.int() + zero


def from_codes(codes: Tensor, scale: Tensor, zero_point: Tensor, granularity: Granularity) -> Tensor:
    """Return `scale * (codes - zero_point)`, float32, shape of `codes`."""
    grouped = split_groups(codes, granularity.size) if isinstance(granularity, PerGroup) else codes
    offset = grouped.int() - broadcastable(zero_point, codes, granularity)
    return (offset * broadcastable(scale, codes, granularity)).reshape(codes.shape)
