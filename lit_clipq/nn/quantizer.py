"""Quantizers: a grid, its calibrated parameters, and nothing else. Layers compose them."""

from torch import Tensor, nn

from lit_clipq.functional.granularity import Granularity, PerTensor, PerToken, extrema
from lit_clipq.functional.uniform import affine_parameters, code_range, fake_quantize, from_codes, to_codes


class UniformQuantizer(nn.Module):
    """Uniform affine grid of 2 to 16 bits.

    The scale (float32) and zero point (int32) are `None` until `set_range` or `load_parameters` gave them, except for
    `PerToken`, which computes both from each input.

    Args:
        bits: Width of the codes, 2 to 16.
        symmetric: Codes -2^(b-1) .. 2^(b-1) - 1 around 0 instead of 0 .. 2^b - 1.
        granularity: What shares a scale.
        restricted: Symmetric grids only: represent the largest magnitude exactly.
    """

    scale: Tensor | None
    zero_point: Tensor | None

    def __init__(
        self,
        bits: int,
        *,
        symmetric: bool,
        granularity: Granularity | None = None,
        restricted: bool = False,
    ) -> None:
        super().__init__()
        self.bits = bits
        self.symmetric = symmetric
        self.granularity: Granularity = granularity or PerTensor()
        self.restricted = restricted
        self.qmin, self.qmax = code_range(bits, symmetric=symmetric)
        self.register_buffer("scale", None)
        self.register_buffer("zero_point", None)

    @property
    def calibrated(self) -> bool:
        """Whether the grid has its parameters."""
        return isinstance(self.granularity, PerToken) or self.scale is not None

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Take the grid that spans [low, high]; both of the scale shape, finite."""
        self.scale, self.zero_point = self._grid_spanning(low, high)

    def load_parameters(self, scale: Tensor, zero_point: Tensor) -> None:
        """Take a scale (float32) and zero point (int32) as they are."""
        self.scale, self.zero_point = scale, zero_point

    def forward(self, x: Tensor) -> Tensor:
        """Round `x` (any shape that fits the granularity) to the grid and back.

        Raises:
            RuntimeError: If the grid was never calibrated.
        """
        scale, zero_point = self._grid_for(x)
        return fake_quantize(x, scale, zero_point, self.qmin, self.qmax, self.granularity)

    def codes(self, x: Tensor) -> Tensor:
        """Return the int32 codes of `x`, same shape."""
        scale, zero_point = self._grid_for(x)
        return to_codes(x, scale, zero_point, self.qmin, self.qmax, self.granularity)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the float32 values of integer `codes`, same shape.

        Raises:
            RuntimeError: If the grid was never calibrated, or is computed per input.
        """
        if self.scale is None or self.zero_point is None:
            raise RuntimeError("this quantizer holds no scale; calibrate it before decoding")
        return from_codes(codes, self.scale, self.zero_point, self.granularity)

    def _grid_for(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(self.granularity, PerToken):
            return self._grid_spanning(*extrema(x.detach(), self.granularity))
        if self.scale is None or self.zero_point is None:
            raise RuntimeError("this quantizer holds no scale; calibrate it before the quantized forward")
        return self.scale, self.zero_point

    def _grid_spanning(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return affine_parameters(low, high, self.bits, symmetric=self.symmetric, restricted=self.restricted)

    def extra_repr(self) -> str:
        """Width, symmetry and granularity, for printing."""
        kind = "symmetric" if self.symmetric else "affine"
        return f"{self.bits} bits, {kind}, {self.granularity}"
