"""Logarithmic grids for values in [0, 1], for comparison with the twin grid after softmax.

Code q stands for `base^-q`, q = 0 .. 2^b - 2: base 2 (FQ-ViT, arXiv 2111.13824) or sqrt 2 (RepQ-ViT, arXiv 2212.08254).
The last code stands for 0, and what rounds past the others has it: a position that a mask hides keeps no weight at all.
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
    exponent = x.float().clamp(min=0).log2().mul_(-steps_per_octave)  # infinite at 0
    return exponent.round_().clamp_(0, 2**bits - 1).int()


def log_decode(codes: Tensor, bits: int, *, steps_per_octave: int = 1) -> Tensor:
    """Return the float32 values of `log_codes`, same shape."""
    return torch.exp2(codes.float() / -steps_per_octave).masked_fill_(codes == 2**bits - 1, 0.0)


def log_fake_quantize(x: Tensor, bits: int, *, steps_per_octave: int = 1) -> Tensor:
    """Round values in [0, 1] to the grid and back; shape and dtype of `x`, straight-through gradient."""
    codes = log_codes(x.detach(), bits, steps_per_octave=steps_per_octave)
    rounded = log_decode(codes, bits, steps_per_octave=steps_per_octave).to(x.dtype)
    return rounded + (x - x.detach()) if torch.is_grad_enabled() and x.requires_grad else rounded
