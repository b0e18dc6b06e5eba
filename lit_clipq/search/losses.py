"""The objective of one layer under many grids at once.

A product has two operands: a weight and its input, or the two sides of an attention product. One comparison takes A
grids of the first and B of the second and gives the objective of every pair, as few large matrix products: on a GPU the
launches, not the arithmetic, would otherwise take the time.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_clipq.calibration.observations import Observations
from lit_clipq.distributed import sum_over_ranks
from lit_clipq.functional.distance import Distance, distance_from_sums, distance_sums, sums_of
from lit_clipq.nn.layout import ROWS, Layout, PairLayout
from lit_clipq.nn.modules import QModule, QWeighted
from lit_clipq.search.candidates import Candidates

_WORKSPACE = {"cpu": 2**20}  # elements of a table's outputs at a time: what a processor's cache holds
_LARGE_WORKSPACE = 2**27
_HELD = 8  # times the workspace: rounded inputs that are held at a time
_TOGETHER = 16  # grids of an attention product's operand that are compared at a time


@dataclass
class ProductLosses:
    """Compares grids of the two operands of a layer.

    Attributes:
        module: Q-module in its float phase.
        candidates: Grids of each operand that is quantized; the others stay float.
        distance: What is added up.
        device: Where the ranks exchange.
    """

    module: QModule
    candidates: Mapping[str, Candidates]
    distance: Distance
    device: torch.device

    def __post_init__(self) -> None:
        weighted = isinstance(self.module, QWeighted)
        self.names = ("weight", "input") if weighted else ("a", "b")
        self.weight = cast(Tensor, self.module.weight).detach().float() if weighted else None
        bias = self.module.bias if weighted else None
        self.bias = None if bias is None else cast(Tensor, bias).detach().float()

    def losses(
        self,
        data: Sequence[Observations],
        first: Tensor | None,
        second: Tensor | None,
        *,
        per_channel: bool = True,
        step: int = 1,
    ) -> Tensor:
        """Return the objective of every pair over all ranks, float64 (A, B, channels of the first operand).

        Args:
            data: What to compare on, with targets.
            first: Candidates of the first operand, int64 (A, channels); `None` leaves it float, and A is 1.
            second: Candidates of the second one, int64 (B, 1); `None` leaves it float, and B is 1.
            per_channel: Whether the channels of a weight are kept apart; else one column is returned.
            step: Only every n-th channel of a weight is computed, and `first` has as many columns (rows only).
        """
        per_channel = per_channel and self.weight is not None
        channels = len(self.weight[::step]) if per_channel and self.weight is not None else 1
        sums = torch.zeros(
            *(1 if x is None else len(x) for x in (first, second)),
            sums_of(self.distance, per_channel=per_channel),
            channels,
            dtype=torch.float64,
            device=self.device,
        )
        for o in data:
            if not len(o.keys):
                continue
            for a, b, found in self._sums(o, first, second, per_channel, step):
                sums[a, b].add_(found)
        family = self._family(0, step)
        if family is not None and per_channel:
            sums = family.pooled(sums)
        return distance_from_sums(sum_over_ranks(sums), self.distance)

    def outputs(
        self, data: Sequence[Observations], first: Tensor, second: Tensor
    ) -> Iterator[tuple[int, slice, Tensor]]:
        """Yield (which of the data, which of its units, their product) under one grid (1, channels) of each operand."""
        weight = None if self.weight is None else self._round(0, self.weight, first)[0]
        for number, o in enumerate(data):
            for part, units in parts(o, cast(Tensor, o.target).shape[1:].numel(), workspace(o.inputs[0].device)):
                if weight is None:
                    output = self._round(0, units.inputs[0], first)[0] @ self._round(1, units.inputs[1], second)[0]
                else:
                    output = self.product(self._round(1, units.inputs[0], second)[0], o.layout, weight)
                yield number, part, output

    def product(self, x: Tensor, layout: Layout, weight: Tensor | None = None) -> Tensor:
        """Return the product of an input with a weight (the layer's own by default), with bias.

        Patches of a convolution go through it as rows of a linear layer.
        """
        weight = cast(Tensor, self.weight if weight is None else weight)
        if layout is ROWS:
            return F.linear(x, weight.flatten(1), self.bias)
        return cast(QWeighted, self.module).product_with(weight, x)

    def targets(self, o: Observations) -> Tensor:
        """Return the float product of observed operands."""
        return o.inputs[0] @ o.inputs[1] if self.weight is None else self.product(o.inputs[0], o.layout)

    def _sums(
        self, o: Observations, first: Tensor | None, second: Tensor | None, per_channel: bool, step: int
    ) -> Iterator[tuple[slice, slice, Tensor]]:
        pairs = isinstance(o.layout, PairLayout)
        compute = self._of_rows if o.layout is ROWS else self._of_products if pairs else self._of_maps
        yield from compute(o, first, second, per_channel, step)

    def _of_rows(
        self, o: Observations, first: Tensor | None, second: Tensor | None, per_channel: bool, step: int
    ) -> Iterator[tuple[slice, slice, Tensor]]:
        weight = cast(Tensor, self.weight).flatten(1)[::step]
        bias = 0 if self.bias is None else self.bias[::step]
        channels, most = len(weight), workspace(weight.device)
        grids = max(1, most // max(len(o.keys) * channels, weight.numel()))
        kept: tuple[slice, Tensor] | None = None
        moved = bias if self.distance != "cosine" else 0  # a difference does not change if both lose the bias
        for part, units in parts(o, channels, most):
            del part
            target = _thin(units.target, step) - moved
            squares = None if units.weight is None else _thin(units.weight, step)
            for group in _slices(second, max(1, _HELD * most // (len(target) * weight.shape[1]))):
                inputs = self._round(1, units.inputs[0], None if second is None else second[group])  # (B, S, in)
                for a in _slices(first, grids):
                    if kept is None or kept[0] != a:
                        kept = a, self._round(0, weight, None if first is None else first[a], step)  # (A, C, in)
                    count = len(kept[1])
                    some = max(1, most // (len(target) * channels * count))
                    for start in range(0, len(inputs), some):
                        x = inputs[start : start + some]
                        product = x.flatten(0, 1) @ kept[1].flatten(0, 1).T  # (B S, A C)
                        output = product.view(len(x), len(target), count, channels).permute(2, 0, 1, 3)
                        if self.distance == "cosine":
                            output = output + bias
                        place = slice(group.start + start, group.start + start + len(x))
                        yield a, place, self._compare(o.layout, output, target, squares, per_channel)

    def _of_products(
        self, o: Observations, first: Tensor | None, second: Tensor | None, per_channel: bool, step: int
    ) -> Iterator[tuple[slice, slice, Tensor]]:
        del per_channel, step
        most = workspace(o.inputs[0].device)
        elements = o.inputs[0].shape[1] * o.inputs[1].shape[2]  # of a unit's product
        for a in _slices(first, _TOGETHER):
            for b in _slices(second, _TOGETHER):
                pairs = (a.stop - a.start) * (b.stop - b.start)
                for part, units in parts(o, pairs * elements, most):
                    del part
                    left = self._round(0, units.inputs[0], None if first is None else first[a]).transpose(0, 1)
                    right = self._round(1, units.inputs[1], None if second is None else second[b]).permute(1, 2, 0, 3)
                    output = left.flatten(1, 2) @ right.flatten(2)  # (P, A M, B N)
                    output = output.unflatten(2, right.shape[2:]).unflatten(1, left.shape[1:3]).permute(1, 3, 0, 2, 4)
                    yield a, b, self._compare(o.layout, output, cast(Tensor, units.target), units.weight, False)

    def _of_maps(
        self, o: Observations, first: Tensor | None, second: Tensor | None, per_channel: bool, step: int
    ) -> Iterator[tuple[slice, slice, Tensor]]:
        for a in _slices(first, 1):
            weight = self._round(0, cast(Tensor, self.weight), None if first is None else first[a])[0]
            for b in _slices(second, 1):
                x = self._round(1, o.inputs[0], None if second is None else second[b])[0]
                output = self.product(x, o.layout, weight)
                found = self._compare(o.layout, output[None, None], cast(Tensor, o.target), o.weight, per_channel)
                yield a, b, found[..., ::step] if per_channel else found

    def _round(self, operand: int, x: Tensor, index: Tensor | None, step: int = 1) -> Tensor:
        """Return `x` (*shape) under each of the grids, (A, *shape); without grids as it is, (1, *shape)."""
        family = self._family(operand, step)
        return x[None] if family is None or index is None else family.apply(x, index)

    def _family(self, operand: int, step: int) -> Candidates | None:
        family = self.candidates.get(self.names[operand])
        return family if family is None or step == 1 else family.every(step)

    def _compare(
        self, layout: Layout, output: Tensor, target: Tensor, weight: Tensor | None, per_channel: bool
    ) -> Tensor:
        axis = layout.channel_axis
        return distance_sums(output, target, weight, self.distance, axis=axis, per_channel=per_channel)


def workspace(device: torch.device) -> int:
    """Return how many elements of products are computed at a time."""
    return _WORKSPACE.get(device.type, _LARGE_WORKSPACE)


def target_of(o: Observations) -> Tensor:
    """Return what the product should be; observations that are ready to be compared on have it."""
    return cast(Tensor, o.target)


def output_elements(o: Observations) -> int:
    """Return how many elements the product of a unit has."""
    return target_of(o).shape[1:].numel()


def _thin(x: Tensor | None, step: int) -> Tensor:
    return cast(Tensor, x)[:, ::step]


def _slices(index: Tensor | None, size: int) -> list[slice]:
    count = 1 if index is None else len(index)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def parts(o: Observations, elements: int, most: int) -> Iterator[tuple[slice, Observations]]:
    """Cut observations into runs of units whose output, of so many elements a unit, fits the workspace."""
    size = max(1, most // max(1, elements))
    for start in range(0, max(1, len(o.inputs[0])), size):
        part = slice(start, start + size)
        yield part, o if size >= len(o.inputs[0]) else o.select(part)
