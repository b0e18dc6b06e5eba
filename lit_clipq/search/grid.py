"""Which family of candidates an operand's grid is searched in."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_clipq.errors import ConfigError
from lit_clipq.functional.granularity import PerChannel, PerGroup, PerTensor
from lit_clipq.nn.adaptive_log import AdaptiveLogQuantizer
from lit_clipq.nn.quantizer import Quantizer, TwinGeluQuantizer, TwinSoftmaxQuantizer, UniformQuantizer
from lit_clipq.search.candidates import Candidates, Fixed, GeluCandidates, SoftmaxCandidates, UniformCandidates
from lit_clipq.search.chained import BaseCandidates, GroupCandidates, WithZeroPoint
from lit_clipq.search.selection import linear_multipliers

_MOST = 10_000  # candidates: far more than a search tells apart


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
    zero_points: bool = False
    """Affine grids: whether other zero points than that of minimum and maximum are searched, too."""

    def __post_init__(self) -> None:
        if not 1 <= self.count <= _MOST:
            raise ConfigError(f"count must be 1 to {_MOST}, got {self.count}")
        if not 0 < self.low < self.high < math.inf:
            raise ConfigError(f"low must be above 0 and below high, got {self.low} and {self.high}")

    def of(
        self, quantizer: Quantizer, low: Tensor, high: Tensor, segments: tuple[int, ...] = (), *, device: torch.device
    ) -> Candidates:
        """Return the candidates for a quantizer whose operand spans [low, high]; see `UniformCandidates`."""
        multipliers = linear_multipliers(self.count, self.low, self.high)
        if isinstance(quantizer, UniformQuantizer) and isinstance(quantizer.granularity, PerTensor | PerChannel):
            moves = self.zero_points and not quantizer.symmetric and isinstance(quantizer.granularity, PerTensor)
            kind = WithZeroPoint if moves else UniformCandidates
            return kind(quantizer, low, high, multipliers, segments, device=device)
        if isinstance(quantizer, UniformQuantizer) and isinstance(quantizer.granularity, PerGroup):
            return GroupCandidates(quantizer, low, high, multipliers, device=device)
        if isinstance(quantizer, TwinSoftmaxQuantizer):
            return SoftmaxCandidates(quantizer, self.count, powers_of_two=self.powers_of_two, device=device)
        if isinstance(quantizer, TwinGeluQuantizer):
            return GeluCandidates(quantizer, high.to(device), multipliers, powers_of_two=self.powers_of_two)
        if isinstance(quantizer, AdaptiveLogQuantizer):
            return BaseCandidates(quantizer, high, device=device)
        return Fixed(quantizer, device)
