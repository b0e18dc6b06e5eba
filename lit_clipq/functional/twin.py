"""Twin uniform grids: one bit of the code picks the range, the other b - 1 bits the value (PTQ4ViT, arXiv 2111.12293).

With n = 2^(b-1) codes a range:

- after softmax, x in [0, 1]: below `split` the step is D1 = split / (n - 1), from `split` on it is D2 = 1 / (n - 1), so
  that 1 is exact. Stored codes are 0 .. n - 1 below and n .. 2n - 1 above.
- after GELU and its relatives: negative values have codes -n .. -1 with D1 = |minimum of the activation| / n, positive
  ones 0 .. n - 1 with D2.

Both functions are piecewise: every x falls into exactly one of the two ranges. They divide by the rate 1 / D, so that
the largest code after softmax is 1 exactly at every width.
"""

from typing import Any

import torch
from torch import Tensor


def _straight_through(x: Tensor, rounded: Tensor, low: Any, high: Any) -> Tensor:
    """Give `rounded` the gradient of `clamp(x, low, high)`, its values unchanged; without gradients return it as is."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return rounded
    clamped = x.clamp(low, high)
    return rounded + (clamped - clamped.detach())


def softmax_codes(x: Tensor, split: Tensor, bits: int) -> Tensor:
    """Return the int32 codes 0 .. 2^b - 1 of values in [0, 1], same shape.

    Args:
        x: Attention weights.
        split: Border of the ranges, scalar in (0, 1].
        bits: Width of the codes, at least 2.
    """
    n = 2 ** (bits - 1)
    steps = (x * _softmax_rates(x < split, split, n)).round_().clamp_(0, n - 1)
    return torch.where(x < split, steps, steps + n).int()


def softmax_decode(codes: Tensor, split: Tensor, bits: int) -> Tensor:
    """Return the float32 values of `softmax_codes`, same shape."""
    n = 2 ** (bits - 1)
    return (codes % n) / _softmax_rates(codes < n, split, n)


def softmax_fake_quantize(x: Tensor, split: Tensor, bits: int) -> Tensor:
    """Round values in [0, 1] to the twin grid and back; shape and dtype of `x`, straight-through gradient."""
    n = 2 ** (bits - 1)
    values = x.detach()
    rates = _softmax_rates(values < split, split, n)
    return _straight_through(x, rates.mul(values).round_().clamp_(0, n - 1).div_(rates).to(x.dtype), 0.0, 1.0)


def _softmax_rates(below: Tensor, split: Tensor, n: int) -> Tensor:
    """Return codes per unit, 1 / D1 where `below` holds and 1 / D2 elsewhere, float32."""
    return torch.where(below, (n - 1) / split, n - 1.0)


def gelu_codes(x: Tensor, negative_step: Tensor, positive_step: Tensor, bits: int) -> Tensor:
    """Return the int32 codes -n .. n - 1 of values behind a GELU-like activation, same shape.

    Args:
        x: Activations.
        negative_step: D1, scalar.
        positive_step: D2, scalar.
        bits: Width of the codes, at least 2.
    """
    n = 2 ** (bits - 1)
    return (x * _gelu_rates(x < 0, negative_step, positive_step)).round_().clamp_(-n, n - 1).int()


def gelu_decode(codes: Tensor, negative_step: Tensor, positive_step: Tensor) -> Tensor:
    """Return the float32 values of `gelu_codes`, same shape."""
    return codes / _gelu_rates(codes < 0, negative_step, positive_step)


def gelu_fake_quantize(x: Tensor, negative_step: Tensor, positive_step: Tensor, bits: int) -> Tensor:
    """Round activations to the twin grid and back; shape and dtype of `x`, straight-through gradient."""
    n = 2 ** (bits - 1)
    values = x.detach()
    rates = _gelu_rates(values < 0, negative_step, positive_step)
    rounded = rates.mul(values).round_().clamp_(-n, n - 1).div_(rates).to(x.dtype)
    return _straight_through(x, rounded, -n * negative_step, (n - 1) * positive_step)


def _gelu_rates(negative: Tensor, negative_step: Tensor, positive_step: Tensor) -> Tensor:
    """Return codes per unit, 1 / D1 where `negative` holds and 1 / D2 elsewhere, float32."""
    return torch.where(negative, 1.0 / negative_step, 1.0 / positive_step)
