"""Candidates of grids with more than one parameter: these are searched one after the other (`Candidates.then`)."""

import copy

import torch
from torch import Tensor

from lit_clipq.functional.adaptive_log import LEAST, MOST, STEPS, adaptive_log_codes, adaptive_log_values
from lit_clipq.nn.adaptive_log import AdaptiveLogQuantizer
from lit_clipq.nn.quantizer import UniformQuantizer
from lit_clipq.search.candidates import Candidates, UniformCandidates

_ZERO_SHARE = 8  # of the codes of a grid: how far its zero point may move to either side
_ZERO_POINTS = 8  # to either side, at most
_PHASES = 8  # of a logarithmic grid's scale in an octave
_OCTAVES = (-16, 5)  # of its scale, in phases
_GROUP_STEPS = (0, -2, 2, -4, 4, -7, 7)  # from a row's own factor: what a group of it is offered
_NEAR_BASES = 8  # to either side that are compared again once the scale is chosen


class WithZeroPoint(UniformCandidates):
    """Multiples of the min-max scale of an affine grid; then its zero point, then the scale once more."""

    moves = True

    def then(self, index: Tensor) -> Candidates | None:
        """Return the zero points around that of minimum and maximum, once."""
        return ZeroPoints(self, index) if self.moves else None

    def at(self, zero_point: Tensor, index: Tensor) -> "WithZeroPoint":
        """Return the same scales with another zero point, beginning from `index`."""
        moved = copy.copy(self)
        moved.zero_point, moved.zero = zero_point.reshape(self.zero_point.shape), int(zero_point)
        moved.start, moved.moves = index, False
        return moved


class ZeroPoints(Candidates):
    """Zero points of an affine grid with one scale, in order; that of minimum and maximum is the start.

    Args:
        scales: The family that the scale was chosen from.
        index: Which of its scales, (1,).
    """

    quantizer: UniformQuantizer

    def __init__(self, scales: WithZeroPoint, index: Tensor) -> None:
        quantizer = self.quantizer = scales.quantizer
        self.scales, self.index, self.scale = scales, index, scales.scale_of(index)
        own = int(quantizer._need("zero_point"))
        most = max(2**quantizer.bits // _ZERO_SHARE, 1)
        step = max(most // _ZERO_POINTS, 1)
        points = range(own - most // step * step, own + most + 1, step)
        within = [z for z in points if quantizer.qmin <= z <= quantizer.qmax]
        self.zero_points = torch.tensor(within, dtype=torch.int32, device=index.device)
        self.count = len(within)
        self.start = torch.full_like(index, within.index(own))

    def apply(self, x: Tensor, index: Tensor) -> Tensor:
        """Round to the grids with these zero points."""
        q, steps = self.quantizer, x.mul(self.scale.reciprocal()).round_()
        each = [steps.clamp(q.qmin - zero, q.qmax - zero) for zero in self.zero_points[index].flatten().tolist()]
        return torch.stack(each).mul_(self.scale)

    def then(self, index: Tensor) -> Candidates | None:
        """Return the scales again, with the zero point that was chosen, if it is another."""
        if torch.equal(index, self.start):
            return None
        return self.scales.at(self.zero_points[index], self.index)

    def limits(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return the values between which the grid of `index` clips nothing."""
        return self.scales.at(self.zero_points[index], self.index).limits(self.index)

    def commit(self, index: Tensor) -> None:
        """Set the scale and the zero point."""
        self.quantizer.load_parameters(self.scale, self.zero_points[index].reshape(self.scale.shape))


class GroupCandidates(UniformCandidates):
    """Multiples of the min-max scales of the groups of a weight's rows: one for a row, then one group after the other.

    Args:
        quantizer: Grid whose parameters are searched, with a scale for each group.
        low: Minimum of each group, (rows, groups, 1).
        high: Maximum, same shape.
        multipliers: Factors on the scales, increasing.
        device: Where the weight is.
    """

    def __init__(
        self, quantizer: UniformQuantizer, low: Tensor, high: Tensor, multipliers: Tensor, *, device: torch.device
    ) -> None:
        super().__init__(quantizer, low, high, multipliers, device=device)
        self.channels = len(self.scale)
        self.start = self.start[: self.channels]
        self.group: int | None = None  # the one that `index` speaks of; none is all of them
        self.chosen = self.start[:, None].expand(self.scale.shape[:2])  # (rows, groups)

    def scale_of(self, index: Tensor) -> Tensor:
        """Return the scales (*, rows, groups, 1) that `index` (*, rows) names."""
        each = index[..., None].expand(*index.shape, self.scale.shape[1])
        if self.group is not None:
            each = self.chosen.expand(each.shape).clone()
            each[..., self.group] = index
        return self.scale * self.multipliers[each][..., None]

    def every(self, step: int) -> "GroupCandidates":
        """Return the candidates for every n-th row."""
        if step == 1:
            return self
        some = copy.copy(self)
        some.scale, some.zero_point, some.chosen = (x[::step] for x in (self.scale, self.zero_point, self.chosen))
        some.channels, some.start = len(some.scale), self.start[::step]
        return some

    def apply(self, x: Tensor, index: Tensor) -> Tensor:
        """Round a weight (rows, in) to the scaled grids, to the bits that `fake_quantize` gives."""
        scale, q = self.scale_of(index), self.quantizer
        groups = x.view(*scale.shape[1:3], -1)
        zero = self.zero_point
        return groups.mul(scale.reciprocal()).round_().clamp_(q.qmin - zero, q.qmax - zero).mul_(scale).flatten(2)

    def then(self, index: Tensor) -> Candidates | None:
        """Return the candidates of the next group; the others keep theirs."""
        place = 0 if self.group is None else self.group + 1
        if place == self.scale.shape[1] or self.scale.shape[1] == 1:
            return None
        after = copy.copy(self)
        after.chosen = self.chosen.clone()
        if self.group is None:
            after.chosen[:] = index[:, None]
        else:
            after.chosen[:, self.group] = index
        after.steps = _GROUP_STEPS
        after.group, after.start = place, after.chosen[:, place].clone()
        return after


class BaseCandidates(Candidates):
    """Bases 2^(q / 37) of a logarithmic grid, q = 1 .. 137; then its scale, then the bases near the chosen one.

    Args:
        quantizer: Grid whose base and scale are searched.
        high: Maximum of the operand, scalar.
        device: Where the operand is.
    """

    quantizer: AdaptiveLogQuantizer

    def __init__(self, quantizer: AdaptiveLogQuantizer, high: Tensor, *, device: torch.device) -> None:
        self.quantizer = quantizer
        whole = (high.float() - quantizer.minimum).clamp(min=1e-6).to(device).reshape(1)
        self.bases = torch.arange(LEAST, MOST + 1, device=device)
        self.factors = torch.exp2(torch.arange(*_OCTAVES, device=device) / _PHASES)
        self.whole, self.scales = whole, whole
        self.count = len(self.bases)
        self.start = torch.full((1,), STEPS - LEAST, device=device)
        self.left = 2  # families to come

    def parameters(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return the bases and scales that `index` (A, 1) names, each (A,)."""
        chosen = index.flatten()
        bases, scales = (x[chosen] if len(x) == self.count else x for x in (self.bases, self.scales))
        return bases.expand(len(chosen)), scales.expand(len(chosen))

    def apply(self, x: Tensor, index: Tensor) -> Tensor:
        """Round to the grids of these bases or scales."""
        bits, minimum = self.quantizer.bits, self.quantizer.minimum
        bases, scales = self.parameters(index)
        logarithm = (x.float() - minimum).clamp_(min=0).log2_()
        values = adaptive_log_values(bases, bits) * scales[:, None] + minimum
        each = zip(bases, scales.log2(), values, strict=True)
        return torch.stack([own[adaptive_log_codes(logarithm - scale, base, bits)] for base, scale, own in each])

    def then(self, index: Tensor) -> Candidates | None:
        """Return the scales of the chosen base, or the bases of the chosen scale."""
        if not self.left:
            return None
        after = copy.copy(self)
        after.left = self.left - 1
        if len(self.bases) > 1:
            after.bases, after.scales = self.bases[index], self.whole * self.factors
            near = (after.scales - self.scales).abs().argmin()
        else:
            own = int(self.bases)
            least, most = max(own - _NEAR_BASES, LEAST), min(own + _NEAR_BASES, MOST)
            after.bases, after.scales = torch.arange(least, most + 1, device=index.device), self.scales[index]
            near = self.bases[0] - least
        after.count, after.start = max(len(after.bases), len(after.scales)), near.reshape(1)
        return after

    def commit(self, index: Tensor) -> None:
        """Set base and scale."""
        base, scale = self.parameters(index)
        self.quantizer.base, self.quantizer.scale = base.reshape(()).int(), scale.reshape(())
