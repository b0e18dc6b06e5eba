"""Twin uniform grids: one bit of the code picks the range, the other b - 1 bits the value (PTQ4ViT, arXiv 2111.12293).

With n = 2^(b-1) codes a range:

- after softmax, x in [0, 1]: below `split` the step is D1 = split / (n - 1), from `split` on it is D2 = 1 / (n - 1), so
  that 1 is exact. Stored codes are 0 .. n - 1 below and n .. 2n - 1 above.
- after GELU and its relatives: negative values have codes -n .. -1 with D1 = |minimum of the activation| / n, positive
  ones 0 .. n - 1 with D2.

Both functions are piecewise: every x falls into exactly one of the two ranges.
"""

from typing import Any

import torch
from torch import Tensor


def _straight_through(x: Tensor, rounded: Tensor, low: Any, high: Any) -> Tensor:
    """Give `rounded` the gradient of `clamp(x, low, high)`; without gradients it is returned as it is."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return rounded
    clamped = x.clamp(low, high)
    return clamped + (rounded - clamped).detach()


def softmax_codes(x: Tensor, split: Tensor, bits: int) -> Tensor:
    """Return the int32 codes 0 .. 2^b - 1 of values in [0, 1], same shape.

    Args:
        x: Attention weights.
        split: Border of the ranges, scalar in (0, 1].
        bits: Width of the codes, at least 2.
    """
    n = 2 ** (bits - 1)
    low = (x * ((n - 1) / split)).round_().clamp_(0, n - 1)
    high = (x * (n - 1)).round_().clamp_(0, n - 1).add_(n)
    return torch.where(x < split, low, high).int()


def softmax_decode(codes: Tensor, split: Tensor, bits: int) -> Tensor:
    """Return the float32 values of `softmax_codes`, same shape."""
    n = 2 ** (bits - 1)
    return torch.where(codes < n, codes * (split / (n - 1)), (codes - n) * (1.0 / (n - 1)))


def softmax_fake_quantize(x: Tensor, split: Tensor, bits: int) -> Tensor:
    """Round values in [0, 1] to the twin grid and back; shape and dtype of `x`, straight-through gradient."""
    n = 2 ** (bits - 1)
    values = x.detach()
    low = values.mul((n - 1) / split).round_().clamp_(0, n - 1).mul_(split / (n - 1))
    high = values.mul(n - 1).round_().clamp_(0, n - 1).mul_(1.0 / (n - 1))
    return _straight_through(x, torch.where(values < split, low, high), 0.0, 1.0)


def gelu_codes(x: Tensor, negative_step: Tensor, positive_step: Tensor, bits: int) -> Tensor:
    """Return the int32 codes -n .. n - 1 of values behind a GELU-like activation, same shape.

    Args:
        x: Activations.
        negative_step: D1, scalar.
        positive_step: D2, scalar.
        bits: Width of the codes, at least 2.
    """
    n = 2 ** (bits - 1)
    negative = (x * (1.0 / negative_step)).round_().clamp_(-n, 0)
    return (x * (1.0 / positive_step)).round_().clamp_(0, n - 1).add_(negative).int()


def gelu_decode(codes: Tensor, negative_step: Tensor, positive_step: Tensor) -> Tensor:
    """Return the float32 values of `gelu_codes`, same shape."""
    return codes.clamp(max=0) * negative_step + codes.clamp(min=0) * positive_step


def gelu_fake_quantize(x: Tensor, negative_step: Tensor, positive_step: Tensor, bits: int) -> Tensor:
    """Round activations to the twin grid and back; shape and dtype of `x`, straight-through gradient."""
    n = 2 ** (bits - 1)
    values = x.detach()
    negative = values.mul(1.0 / negative_step).round_().clamp_(-n, 0).mul_(negative_step)
    positive = values.mul(1.0 / positive_step).round_().clamp_(0, n - 1).mul_(positive_step)
    return _straight_through(x, negative.add_(positive), -n * negative_step, (n - 1) * positive_step)
