"""What a grid is for integer kernels: codes with a step, two such halves, or nothing that a kernel can multiply."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Affine:
    """Codes qmin .. qmax with value = scale * (code - zero_point)."""

    scale: Tensor
    """Step, float32: () for the whole tensor, (C,) along `axis`, or (..., groups, 1) with a `group_size`."""
    zero_point: Tensor
    """Code of 0, int32, shape of `scale`."""
    qmin: int
    qmax: int
    axis: int | None = None
    """What the scales run along; `None` where there is one."""
    group_size: int | None = None
    """Neighbours along the last axis that share a scale; `None` where scales do not run along groups."""


@dataclass(frozen=True)
class Branch:
    """One half of a twin grid: codes 0 .. most with value = step * code; the step may be negative."""

    step: float
    most: int


@dataclass(frozen=True)
class TwoBranches:
    """A twin grid: values below `split` lie on one half, the others on the other half.

    Both halves hold 0, so with x = x [x < split] + x [x >= split] a product is the sum of two products of codes.
    """

    split: float
    below: Branch
    above: Branch


IntegerForm = Affine | TwoBranches


class NotExportable(Exception):  # noqa: N818 - a statement about a grid, not a fault
    """A grid or layer that no integer kernel computes.

    Attributes:
        reason: Why.
        advice: The option that makes it exportable.
    """

    def __init__(self, reason: str, advice: str) -> None:
        super().__init__(f"{reason}; {advice}")
        self.reason, self.advice = reason, advice
