"""Logarithmic grids of an adaptive base for values in [0, 1] (AdaLog, arXiv 2407.12951).

The base is 2^(q/r) with r = 37 and a whole number q, so that code c stands for

    2^-floor(q c / r) * T[q c mod r],   T[k] = 2^(-k/r) rounded to a multiple of 1 / (2^(b+1) - 2),

which integer hardware computes from a table of r entries and a shift. Codes are c = round(-log2(x) r / q), from 0 to
2^b - 2; the last code stands for 0, and what rounds past the others has it. So there are 2^b values, 0 among them. With
q = r it is the grid of base 2.
"""

import torch
from torch import Tensor

STEPS = 37
"""r: steps of the exponent in an octave."""
LEAST, MOST = 1, 137
"""The range of q that is searched; the paper has 10 .. 137 for 3 to 6 bits, and finer bases serve wider codes."""


def adaptive_log_values(base: Tensor, bits: int) -> Tensor:
    """Return the value of every code, float32 (*, 2^b).

    Args:
        base: q, int32 or int64, any shape.
        bits: Width of the codes.
    """
    steps = base[..., None].long() * torch.arange(2**bits, device=base.device)
    levels = 2 ** (bits + 1) - 2
    table = torch.exp2(-torch.arange(STEPS, dtype=torch.float64, device=base.device) / STEPS)
    table = (table * levels).round() / levels
    values = torch.exp2(-(steps // STEPS).double()) * table[steps % STEPS]
    values[..., -1] = 0
    return values.float()


def adaptive_log_codes(logarithm: Tensor, base: Tensor, bits: int) -> Tensor:
    """Return the int32 codes 0 .. 2^b - 1 of values in [0, 1] by their logarithm.

    Args:
        logarithm: log2 of the values, float32, -inf for 0.
        base: q; broadcast against `logarithm`.
        bits: Width of the codes.
    """
    return (logarithm * (-STEPS / base)).round_().clamp_(0, 2**bits - 1).int()
