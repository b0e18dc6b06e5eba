"""Observations of one layer made ready for its search: joined, thinned out, and the same on every number of ranks."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_clipq.calibration.collect import Observations
from lit_clipq.calibration.distributed import sum_over_ranks

_FEWEST_UNITS, _FEWEST_ELEMENTS = 64, 2**16  # of the output: what a comparison should see at least
_FLOOR = 0.1  # of the mean cost: also units that seem not to matter are drawn sometimes


def joined(seen: list[Observations]) -> list[Observations]:
    """Join observations whose units have the same shape; `seen` is emptied so that nothing is held twice for long."""
    groups: dict[tuple[torch.Size, ...], list[Observations]] = {}
    for o in seen:
        groups.setdefault(tuple(x.shape[1:] for x in o.inputs), []).append(o)
    seen.clear()
    return [_join(groups.pop(shapes)) for shapes in list(groups)]


def _join(group: list[Observations]) -> Observations:
    if len(group) == 1:
        return group[0]
    inputs = tuple(torch.cat([o.inputs[i] for o in group]) for i in range(len(group[0].inputs)))
    for o in group:
        o.inputs = ()
    columns = {"keys": torch.cat([o.keys for o in group])}
    for name in ("weight", "target"):
        parts = [getattr(o, name) for o in group]
        if all(part is not None for part in parts):
            columns[name] = torch.cat(parts)
    return Observations(inputs, **columns)


def with_influence(data: Sequence[Observations]) -> list[Observations]:
    """Leave out units whose output gradients are all zero: no error there costs anything.

    In the last block of a tower that is pooled at one token these are all others.
    """
    kept = []
    for o in data:
        if o.weight is not None:
            matters = o.weight.flatten(1).amax(dim=1) > 0
            o = o if bool(matters.all()) else o.select(matters)
        kept.append(o)
    return kept


def thinned(data: Sequence[Observations], step: int) -> list[Observations]:
    """Return every n-th output channel of the targets and weights of rows."""

    def some(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[:, ::step].contiguous()

    return [replace(o, weight=some(o.weight), target=some(o.target)) for o in data]


@dataclass
class Draw:
    """Draws units of a layer for comparisons that need not see them all.

    Units that cost more are drawn rather, and weigh 1 / their chance; without gradients all are equally likely. What is
    drawn depends on keys and costs alone, and its rate on sums over ranks, so that any number of ranks draws the same.
    Small layers are drawn from less, or not at all. Of a convolution output positions are drawn, each with the patch of
    the input that it sees: rows of a linear layer.

    Args:
        data: What there is to draw from, with targets.
        costs: For each, what an error of each unit costs, float32 (N,), of a convolution (B, H W).
        device: Where the ranks exchange.
        convolution: The layer, if it is a convolution of one group.
    """

    data: Sequence[Observations]
    costs: Sequence[Tensor]
    device: torch.device
    convolution: nn.Module | None = None
    _drawn: dict[int, list[Observations]] = field(default_factory=dict)
    _totals: tuple[float, float, float] | None = None

    def thins(self, every: int) -> bool:
        """Tell, on every rank alike, whether `about` leaves units out."""
        return self._rate(every) > 1

    def about(self, every: int) -> list[Observations]:
        """Return about one of `every` units, or the data as they are."""
        every = self._rate(every)
        if every == 1:
            return list(self.data)
        if every not in self._drawn:
            self._drawn[every] = [self._draw(o, c, every) for o, c in zip(self.data, self.costs, strict=True)]
        return self._drawn[every]

    def _rate(self, every: int) -> int:
        """Return how many units there are to one that is drawn."""
        if self._totals is None:
            self._totals = self._add_up()
        units, elements, _ = self._totals
        return max(1, min(every, int(units) // _FEWEST_UNITS, int(elements) // _FEWEST_ELEMENTS))

    def _add_up(self) -> tuple[float, float, float]:
        """Return units, elements of their outputs, and costs over all ranks."""
        totals = torch.zeros(3, dtype=torch.float64, device=self.device)
        for o, cost in zip(self.data, self.costs, strict=True):
            totals[0] += cost.numel()
            totals[1] += _known(o.target).numel()
            totals[2] += cost.sum(dtype=torch.float64)
        units, elements, cost = sum_over_ranks(totals).tolist()
        return units, elements, cost

    def _draw(self, o: Observations, cost: Tensor, every: int) -> Observations:
        units, _, total = cast(tuple[float, float, float], self._totals)
        keys = o.keys if cost.dim() == 1 else o.keys[:, None] + torch.arange(cost.shape[1], device=cost.device)
        chance = torch.full_like(cost, 1 / every, dtype=torch.float64)
        if o.weight is not None and total > 0:
            chance = (cost.double() * (units / total)).clamp(min=_FLOOR).div(every).clamp(max=1)
        chosen = _hashed(keys).double() / 2**31 < chance
        drawn = o.select(chosen) if cost.dim() == 1 else self._patches(o, chosen)
        if drawn.weight is not None:
            drawn.weight = drawn.weight / chance[chosen].float().view(-1, *[1] * (drawn.weight.dim() - 1))
        return drawn

    def _patches(self, o: Observations, chosen: Tensor) -> Observations:
        """Return the chosen output positions (B, H W) of a convolution as rows."""

        def rows(maps: Tensor) -> Tensor:
            return maps.flatten(2).transpose(1, 2)[chosen]

        drawn = []
        for i, picture in enumerate(o.inputs[0]):
            drawn.append(patches_of(picture[None], cast(nn.Module, self.convolution))[0].T[chosen[i]])
        weight = None if o.weight is None else rows(o.weight)
        return Observations((torch.cat(drawn),), chosen.nonzero()[:, 0], weight, rows(_known(o.target)))


def patches_of(x: Tensor, layer: nn.Module) -> Tensor:
    """Return what each output position of a convolution sees of x (B, C, H, W): (B, C kh kw, H' W')."""
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)  # type: ignore[arg-type]
        return F.unfold(x, layer.kernel_size, layer.dilation, 0, layer.stride)  # type: ignore[arg-type]
    return F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # type: ignore[arg-type]


def _known(target: Tensor | None) -> Tensor:
    assert target is not None  # noqa: S101 - the search fills targets in before it draws
    return target


def _hashed(keys: Tensor) -> Tensor:
    """Mix the bits of int64 keys to 0 .. 2^31 - 1; neighbours become unrelated."""
    mixed = (keys * 0x9E3779B1) & 0x7FFFFFFFFFFF
    mixed = (mixed ^ (mixed >> 15)) * 0x85EBCA6B
    mixed = (mixed ^ (mixed >> 13)) * 0xC2B2AE35
    return (mixed ^ (mixed >> 16)) & 0x7FFFFFFF
