"""The logarithmic grid whose base is searched, after softmax and behind GELU-like activations."""

from typing import Any

import torch
from torch import Tensor

from lit_clipq.functional.adaptive_log import adaptive_log_codes, adaptive_log_values
from lit_clipq.functional.uniform import code_range
from lit_clipq.nn.quantizer import Quantizer


class AdaptiveLogQuantizer(Quantizer):
    """Grid of `scale * 2^(-q c / 37) + minimum`; see `lit_clipq.functional.adaptive_log`.

    Behind an activation whose values go down to `minimum`, what is rounded is the distance from there. An integer
    engine multiplies the codes of that distance and has the rest in the reader's bias: `b + minimum * W 1`.

    Args:
        bits: Width of the codes.
        minimum: Smallest value of the operand, at most 0; after softmax 0.
    """

    id = "adaptive_log"
    base: Tensor | None
    scale: Tensor | None

    def __init__(self, bits: int, minimum: float = 0.0) -> None:
        super().__init__()
        code_range(bits, symmetric=False)
        if not minimum <= 0:
            raise ValueError(f"expected the minimum of an activation, at most 0, got {minimum}")
        self.bits = bits
        self.minimum = minimum
        self.register_buffer("base", None)  # q
        self.register_buffer("scale", None)

    def config(self) -> dict[str, Any]:
        """Return the options as plain values."""
        return {"type": self.id, "bits": self.bits, "minimum": self.minimum}

    def forward(self, x: Tensor) -> Tensor:
        """Round values to the grid and back; straight-through gradient."""
        rounded = self.decode(self.codes(x.detach())).to(x.dtype)
        return rounded + (x - x.detach()) if torch.is_grad_enabled() and x.requires_grad else rounded

    def codes(self, x: Tensor) -> Tensor:
        """Return the int32 codes 0 .. 2^b - 1, same shape."""
        distance = (x.float() - self.minimum).clamp_(min=0).log2_() - self._need("scale").log2()
        return adaptive_log_codes(distance, self._need("base"), self.bits)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the float32 values of `codes`, same shape."""
        return self.values()[codes]

    def values(self) -> Tensor:
        """Return the value of every code, float32 (2^b,)."""
        return adaptive_log_values(self._need("base"), self.bits) * self._need("scale") + self.minimum
