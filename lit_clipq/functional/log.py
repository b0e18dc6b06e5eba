"""Logarithmic grids for values in (0, 1], for comparison with the twin grid after softmax.

Code q stands for `base^-q`, q = 0 .. 2^b - 1: base 2 (FQ-ViT, arXiv 2111.13824) or sqrt 2 (RepQ-ViT, arXiv 2212.08254).
What rounds past the last code has that code, 0 included: the grid has no zero.
"""

import torch
from torch import Tensor


def log_codes(x: Tensor, bits: int, *, steps_per_octave: int = 1) -> Tensor:
    """Return the int32 codes 0 .. 2^b - 1 of values in [0, 1], same shape.

    Args:
        x: Values.
        bits: Width of the codes.
        steps_per_octave: 1 for base 2, 2 for base sqrt 2.
    """
    exponent = x.clamp(min=torch.finfo(x.dtype).tiny).log2().mul_(-steps_per_octave)
    return exponent.round_().clamp_(0, 2**bits - 1).int()


def log_decode(codes: Tensor, *, steps_per_octave: int = 1) -> Tensor:
    """Return the float32 values `2^(-codes / steps_per_octave)`, same shape."""
    return torch.exp2(codes.float() / -steps_per_octave)


def log_fake_quantize(x: Tensor, bits: int, *, steps_per_octave: int = 1) -> Tensor:
    """Round values in [0, 1] to the grid and back; shape and dtype of `x`, straight-through gradient."""
    rounded = log_decode(
        log_codes(x.detach(), bits, steps_per_octave=steps_per_octave), steps_per_octave=steps_per_octave
    )
    rounded = rounded.to(x.dtype)
    return x + (rounded - x).detach() if torch.is_grad_enabled() and x.requires_grad else rounded
