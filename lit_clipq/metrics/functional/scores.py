"""What one metric says about each sample."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class SampleScores:
    """One metric's score of every sample, in a fixed order: the metric is their mean.

    Two runs over the same data list the same samples in the same order, so that scores can be compared pair by pair.
    """

    values: Tensor
    """float64 (n,), on the CPU."""
    clusters: Tensor
    """int64 (n,), on the CPU: the picture each sample belongs to. Samples of one picture are not independent."""
