"""Families of candidate grids for one operand: a start (min-max) and what each index stands for."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_clipq.functional.granularity import PerChannel, PerTensor, PerToken
from lit_clipq.functional.search import linear_multipliers
from lit_clipq.functional.twin import gelu_fake_quantize, softmax_fake_quantize
from lit_clipq.functional.uniform import broadcastable, fake_quantize
from lit_clipq.nn.quantizer import Quantizer, TwinGeluQuantizer, TwinSoftmaxQuantizer, UniformQuantizer


class Candidates(ABC):
    """Grids an operand may take, numbered 0 .. count - 1, for each of `channels` independent scales.

    Attributes:
        count: Number of candidates.
        channels: Number of scales that are searched apart.
        start: Index of the min-max grid (the nearest candidate), int64 (channels,).
    """

    count: int
    channels: int = 1
    start: Tensor

    @abstractmethod
    def apply(self, x: Tensor, index: Tensor) -> Tensor:
        """Round `x` to the grids that `index` (channels,) names."""

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
        ties: Group of each channel, int64, where channels share a factor (one scale for each of q, k and v).
    """

    def __init__(
        self, quantizer: UniformQuantizer, low: Tensor, high: Tensor, multipliers: Tensor, ties: Tensor | None = None
    ) -> None:
        self.quantizer = quantizer
        quantizer.set_range(low, high)
        self.scale, self.zero_point = quantizer._need("scale").clone(), quantizer._need("zero_point").clone()
        self.multipliers = multipliers.to(self.scale.device)
        self.count = len(multipliers)
        self.ties = ties
        self.channels = int(ties.max()) + 1 if ties is not None else self.scale.numel()
        nearest = int((multipliers - 1).abs().argmin())
        self.start = torch.full((self.channels,), nearest, device=self.scale.device)

    def _scale(self, index: Tensor) -> Tensor:
        factors = self.multipliers[index]
        if self.ties is not None:
            factors = factors[self.ties]
        return self.scale * factors.reshape(self.scale.shape)

    def apply(self, x: Tensor, index: Tensor) -> Tensor:
        """Round to the scaled grids."""
        q = self.quantizer
        if q.symmetric and isinstance(q.granularity, PerChannel):  # torch's fused operator would wait for the device
            scale = broadcastable(self._scale(index), x, q.granularity)
            return x.mul(1.0 / scale).round_().clamp_(q.qmin, q.qmax).mul_(scale)
        return fake_quantize(x, self._scale(index), self.zero_point, q.qmin, q.qmax, q.granularity)

    def commit(self, index: Tensor) -> None:
        """Set the scaled grids."""
        self.quantizer.load_parameters(self._scale(index), self.zero_point)


class SoftmaxCandidates(Candidates):
    """Splits of the twin grid after softmax, evenly spaced in the logarithm.

    Args:
        quantizer: Grid whose split is searched.
        count: Number of candidates.
        powers_of_two: Only splits 2^-m, so that the steps differ by shifts.
    """

    def __init__(
        self, quantizer: TwinSoftmaxQuantizer, count: int, *, powers_of_two: bool, device: torch.device
    ) -> None:
        self.quantizer = quantizer
        exponents = torch.arange(-16.0, 1.0) if powers_of_two else torch.linspace(-12, 0, count)
        self.splits = torch.exp2(exponents).to(device)
        self.count = len(self.splits)
        self.start = torch.full((1,), int((exponents + 3).abs().argmin()), device=device)

    def apply(self, x: Tensor, index: Tensor) -> Tensor:
        """Round to the twin grid with one split."""
        return softmax_fake_quantize(x, self.splits[index].reshape(()), self.quantizer.bits)

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
        """Round to the twin grid with one positive step."""
        return gelu_fake_quantize(x, self.negative_step, self.steps[index].reshape(()), self.quantizer.bits)

    def commit(self, index: Tensor) -> None:
        """Set the positive step."""
        self.quantizer.positive_step = self.steps[index].reshape(())


class Fixed(Candidates):
    """A grid that needs no search (logarithmic, per token)."""

    count = 1

    def __init__(self, quantizer: Quantizer, device: torch.device) -> None:
        self.quantizer = quantizer
        self.start = torch.zeros(1, dtype=torch.int64, device=device)

    def apply(self, x: Tensor, index: Tensor) -> Tensor:  # noqa: ARG002 - there is one grid
        """Round to the grid."""
        return self.quantizer(x)

    def commit(self, index: Tensor) -> None:
        """Nothing to set."""


@dataclass(frozen=True)
class CandidateGrid:
    """Which candidates are offered."""

    count: int = 100
    """Number of candidates."""
    low: float = 0.01
    """Smallest multiple of the min-max scale."""
    high: float = 1.2
    """Largest multiple of the min-max scale."""
    powers_of_two: bool = False
    """Twin grids: the two steps differ by a power of two, so that integer hardware needs shifts only."""

    def of(self, quantizer: Quantizer, low: Tensor, high: Tensor, ties: Tensor | None = None) -> Candidates:
        """Return the candidates for a quantizer whose operand spans [low, high]."""
        multipliers = linear_multipliers(self.count, self.low, self.high)
        if isinstance(quantizer, UniformQuantizer) and isinstance(quantizer.granularity, PerTensor | PerChannel):
            return UniformCandidates(quantizer, low, high, multipliers, ties)
        if isinstance(quantizer, TwinSoftmaxQuantizer):
            return SoftmaxCandidates(quantizer, self.count, powers_of_two=self.powers_of_two, device=low.device)
        if isinstance(quantizer, TwinGeluQuantizer):
            return GeluCandidates(quantizer, high, multipliers, powers_of_two=self.powers_of_two)
        if isinstance(quantizer, UniformQuantizer) and not isinstance(quantizer.granularity, PerToken):
            quantizer.set_range(low, high)
        return Fixed(quantizer, low.device)
