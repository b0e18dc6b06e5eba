"""Families of candidate grids for one operand: a start (min-max) and what each index stands for."""

import copy
from abc import ABC, abstractmethod
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lit_clipq.functional.twin import gelu_fake_quantize, softmax_fake_quantize
from lit_clipq.nn.quantizer import Quantizer, TwinGeluQuantizer, TwinSoftmaxQuantizer, UniformQuantizer


class Candidates(ABC):
    """Grids an operand may take, numbered 0 .. count - 1, for each of `channels` independent scales.

    Attributes:
        quantizer: Grid whose parameters are searched.
        count: Number of candidates.
        channels: Number of scales that are searched apart.
        start: Index of the min-max grid (the nearest candidate), int64 (channels,).
        steps: From the start, the candidates that are compared of a family that comes after another; `None` is all.
    """

    quantizer: Quantizer
    count: int
    channels: int = 1
    start: Tensor
    steps: tuple[int, ...] | None = None

    @abstractmethod
    def apply(self, x: Tensor, index: Tensor) -> Tensor:
        """Round `x` (*shape) to each of the grids that `index` (A, channels) names: (A, *shape)."""

    def pooled(self, sums: Tensor) -> Tensor:
        """Add sums (*, out) of the channels of a product up to (*, channels), those of the scales."""
        return sums if sums.shape[-1] == self.channels else sums.sum(-1, keepdim=True)

    def every(self, step: int) -> "Candidates":  # noqa: ARG002 - for those without channels
        """Return the candidates for every n-th channel of the operand."""
        return self

    def then(self, index: Tensor) -> "Candidates | None":  # noqa: ARG002 - most have one parameter
        """Return the family that is searched next, with the grid of `index` for its start; `None` after the last."""
        return None

    def limits(self, index: Tensor) -> tuple[Tensor, Tensor] | None:  # noqa: ARG002 - only uniform grids have some
        """Return the values between which the grid of `index` clips nothing, where that can be said."""
        return None

    @abstractmethod
    def commit(self, index: Tensor) -> None:
        """Give the quantizer the grid that `index` names."""


class UniformCandidates(Candidates):
    """Multiples of the min-max scale; the zero point stays.

    Args:
        quantizer: Grid whose parameters are searched.
        low: Minimum of the operand, scale shape.
        high: Maximum, same shape.
        multipliers: Factors on the scale, increasing.
        segments: Channels that share a factor, in order, where they do (one scale for each of q, k and v).
        device: Where the operand is.
    """

    quantizer: UniformQuantizer

    def __init__(
        self,
        quantizer: UniformQuantizer,
        low: Tensor,
        high: Tensor,
        multipliers: Tensor,
        segments: tuple[int, ...] = (),
        *,
        device: torch.device,
    ) -> None:
        self.quantizer = quantizer
        quantizer.set_range(low, high)
        self.scale, self.zero_point = (quantizer._need(name).to(device) for name in ("scale", "zero_point"))
        self.multipliers = multipliers.to(device)
        self.zero = int(quantizer._need("zero_point")) if not self.scale.dim() else None
        self.count = len(multipliers)
        self.channels = len(segments) or self.scale.numel()
        self.start = torch.full((self.channels,), _nearest(multipliers), device=device)
        sizes = torch.tensor(segments, dtype=torch.int64)
        self.segment_of = torch.repeat_interleave(sizes).to(device) if segments else None

    def scale_of(self, index: Tensor) -> Tensor:
        """Return the scales that `index` (*, channels) names, of the scale shape each."""
        factors = self.multipliers[index if self.segment_of is None else index[..., self.segment_of]]
        return self.scale * factors.reshape((*index.shape[:-1], *self.scale.shape))

    def limits(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return the values between which the grid of `index` clips nothing: half a step beyond its outermost codes."""
        scale = self.scale_of(index)
        return tuple(scale * (q - self.zero_point) for q in (self.quantizer.qmin - 0.5, self.quantizer.qmax + 0.5))  # type: ignore[return-value]

    def pooled(self, sums: Tensor) -> Tensor:
        """Add sums up within each segment."""
        if self.segment_of is None:
            return super().pooled(sums)
        return sums @ torch.nn.functional.one_hot(self.segment_of, self.channels).to(sums)

    def every(self, step: int) -> "UniformCandidates":
        """Return the candidates for every n-th channel of the operand."""
        if step == 1 or not self.scale.dim():
            return self
        some = copy.copy(self)
        some.scale, some.zero_point = self.scale[::step], self.zero_point[::step]
        if self.segment_of is not None:
            some.segment_of = self.segment_of[::step]
        else:
            some.channels = len(some.scale)
        return some

    def apply(self, x: Tensor, index: Tensor) -> Tensor:
        """Round to the scaled grids, to the bits that `fake_quantize` gives."""
        scale = self.scale_of(index).view(len(index), *self._spread(x))
        q = self.quantizer
        zero: Any = self.zero
        if q.symmetric:
            zero = 0
        elif zero is None:
            zero = self.zero_point.view(self._spread(x))
        return x.mul(scale.reciprocal()).round_().clamp_(q.qmin - zero, q.qmax - zero).mul_(scale)

    def _spread(self, x: Tensor) -> list[int]:
        """Return the shape in which values of the scale shape meet `x`."""
        shape = [1] * x.dim()
        if self.scale.dim():
            shape[self.quantizer.granularity.axis] = -1  # type: ignore[union-attr]
        return shape

    def commit(self, index: Tensor) -> None:
        """Set the scaled grids."""
        self.quantizer.load_parameters(self.scale_of(index), self.zero_point)


@lru_cache
def _nearest(multipliers: Tensor) -> int:
    """Return which of the multipliers is nearest to 1; they are known by identity."""
    return int((multipliers - 1).abs().argmin())


class SoftmaxCandidates(Candidates):
    """Splits of the twin grid after softmax, evenly spaced in the logarithm.

    Args:
        quantizer: Grid whose split is searched.
        count: Number of candidates.
        powers_of_two: Only splits 2^-m, so that the steps differ by shifts.
    """

    quantizer: TwinSoftmaxQuantizer

    def __init__(
        self, quantizer: TwinSoftmaxQuantizer, count: int, *, powers_of_two: bool, device: torch.device
    ) -> None:
        self.quantizer = quantizer
        exponents = torch.arange(-16.0, 1.0) if powers_of_two else torch.linspace(-12, 0, count)
        self.splits = torch.exp2(exponents).to(device)
        self.count = len(self.splits)
        self.start = torch.full((1,), int((exponents + 3).abs().argmin()), device=device)

    def apply(self, x: Tensor, index: Tensor) -> Tensor:
        """Round to the twin grids with these splits."""
        return softmax_fake_quantize(x, _each(self.splits[index], x), self.quantizer.bits)

    def commit(self, index: Tensor) -> None:
        """Set the split."""
        self.quantizer.split = self.splits[index].reshape(())


class GeluCandidates(Candidates):
    """Positive steps of the twin grid behind a GELU-like activation; the negative one is fixed.

    Args:
        quantizer: Grid whose positive step is searched.
        high: Maximum of the operand, scalar.
        multipliers: Factors on the step that represents `high`, increasing.
        powers_of_two: Only positive steps that are 2^m times the negative one.
    """

    quantizer: TwinGeluQuantizer

    def __init__(self, quantizer: TwinGeluQuantizer, high: Tensor, multipliers: Tensor, *, powers_of_two: bool) -> None:
        self.quantizer = quantizer
        whole = (high.clamp(min=1e-6) / (2 ** (quantizer.bits - 1) - 1)).float()
        self.negative_step = quantizer.negative_step = quantizer.negative_step.to(whole.device)
        if powers_of_two:
            self.steps = self.negative_step * torch.exp2(torch.arange(-8.0, 17.0, device=whole.device))
        else:
            self.steps = whole * multipliers.to(whole.device)
        self.count = len(self.steps)
        self.start = (self.steps - whole).abs().argmin().reshape(1)

    def apply(self, x: Tensor, index: Tensor) -> Tensor:
        """Round to the twin grids with these positive steps."""
        return gelu_fake_quantize(x, self.negative_step, _each(self.steps[index], x), self.quantizer.bits)

    def commit(self, index: Tensor) -> None:
        """Set the positive step."""
        self.quantizer.positive_step = self.steps[index].reshape(())


class Fixed(Candidates):
    """A grid that needs no search (logarithmic, per token)."""

    count = 1

    def __init__(self, quantizer: Quantizer, device: torch.device) -> None:
        self.quantizer = quantizer
        self.start = torch.zeros(1, dtype=torch.int64, device=device)

    def apply(self, x: Tensor, index: Tensor) -> Tensor:
        """Round to the grid."""
        return self.quantizer(x).expand(len(index), *x.shape)

    def commit(self, index: Tensor) -> None:
        """Nothing to set."""


def _each(values: Tensor, x: Tensor) -> Tensor:
    """View one value a grid (A, 1) so that it meets `x` once for each: (A, 1, ..., 1)."""
    return values.view(len(values), *[1] * x.dim())
