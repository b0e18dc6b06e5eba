"""Few units of one layer that stand for all of them, the same on every number of ranks."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_clipq.calibration.batches import hashed
from lit_clipq.calibration.observations import Observations
from lit_clipq.distributed import sum_over_ranks
from lit_clipq.nn.layout import ROWS

_FEWEST_UNITS, _FEWEST_ELEMENTS = 24, 2**14  # of the output: what a comparison should see at least
_FLOOR = 0.1  # of the mean cost: also units that seem not to matter are drawn sometimes
_LOWEST_RATE = 2.0**-14  # at which a unit of mean cost is drawn
_STEPS = 36  # rates, half an octave apart; at the last all units are taken
_ROWS = 2**16  # more than a unit has rows or positions
_AT_ONCE = 2**17  # units whose chances are held at a time
_FEW_PATCHES = 2**22  # elements of a convolution's patches and products up to which it is rows though all are taken


def factored(data: Sequence[Observations], channels: int, device: torch.device) -> list[Observations]:
    """Return the data with weights of errors w (rows x channels) replaced by `mean_c w * mean_n w / mean w`.

    Means are over the rows of all ranks. The total stays, and what each row and each channel weighs.
    """
    weights = [cast(Tensor, o.weight) for o in data]
    sums = torch.zeros(channels, dtype=torch.float64, device=device)
    for w in weights:
        sums += w.float().sum([d for d in range(w.dim()) if d != 1]).double()
    sums = sum_over_ranks(sums)
    by_channel = (sums / sums.mean().clamp(min=1e-300)).float()
    return [
        replace(o, weight=w.float().mean(1, keepdim=True) * by_channel.view(-1, *[1] * (w.dim() - 2)))
        for o, w in zip(data, weights, strict=True)
    ]


@dataclass
class Sampler:
    """Draws units of a layer for comparisons that need not see them all.

    A unit is drawn with chance p and weighs 1 / p. With gradients p grows with what an error of the unit costs, c; then
    the sum over drawn units has the relative standard error `sqrt(sum c^2 (1 / p - 1)) / sum c`, and as many are drawn
    as a wanted error takes: few where few units decide (a pooled tower's class tokens), many where all matter alike.
    What is drawn depends on keys and costs alone, and its number on sums over ranks, so that any number of ranks draws
    the same. Of a convolution output positions are drawn, each with the patch of the input that it sees: rows of a
    linear layer. Of matrix products rows of the left operand are. Where not all are taken, units without influence are
    neither drawn nor counted: how many there are behind the ends of texts depends on what other texts are in a batch.

    Args:
        data: What there is to draw from, with targets.
        costs: For each, what an error of each unit costs, float32 (N,); of a convolution (B, H W), of products (P, M).
        device: Where the ranks exchange.
        convolution: The layer, if it is a convolution of one group.
    """

    data: Sequence[Observations]
    costs: Sequence[Tensor]
    device: torch.device
    convolution: nn.Module | None = None
    _drawn: dict[int, list[Observations]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        matters = [_matters(o) for o in self.data]
        totals = torch.zeros(3, dtype=torch.float64, device=self.device)  # units, elements of their outputs, costs
        for o, cost, matter in zip(self.data, self.costs, matters, strict=True):
            elements = o.layout.elements(_known(o.target), matter)
            sums = (matter.sum(), elements, cost.sum(dtype=torch.float64))
            totals += torch.stack([x.to(totals) for x in sums])
        units, elements, cost = sum_over_ranks(totals).tolist()
        self.mean_cost = cost / max(units, 1) if cost > 0 else 0.0
        self._relative = [self._in_means(*part) for part in zip(self.data, self.costs, matters, strict=True)]
        rates = torch.exp2(torch.arange(_STEPS, dtype=torch.float64, device=self.device) / 2) * _LOWEST_RATE
        expected = torch.zeros(2, _STEPS, dtype=torch.float64, device=self.device)  # number, sum c^2 (1 / p - 1)
        for costs, matter in zip(self._relative, matters, strict=True):
            for relative in costs[matter].split(_AT_ONCE):
                chance = _chance(relative, rates[:, None])
                expected[0] += chance.sum(1)
                expected[1] += (relative.square() * (1 / chance - 1)).sum(1)
        number, variance = sum_over_ranks(expected)
        enough = (number >= _FEWEST_UNITS) & (number * (elements / max(units, 1)) >= _FEWEST_ELEMENTS)
        errors = torch.where(enough, variance.sqrt() / max(units, 1), torch.inf)
        self._rates, self._errors = rates.tolist(), errors.tolist()
        weight = cast(Tensor, self.convolution.weight) if self.convolution is not None else None
        self._few = weight is not None and units * (weight[0].numel() + len(weight)) <= _FEW_PATCHES

    def by_rows(self, error: float) -> bool:
        """Tell, on every rank alike, whether `sample` makes rows of a convolution's maps."""
        return self.convolution is not None and (self._few or self._thins(self._step(error)))

    def sample(self, relative_error: float) -> list[Observations]:
        """Return as many units as that relative standard error of their sum takes, or the data as they are."""
        step = self._step(relative_error)
        if not (self._thins(step) or self._few):
            return list(self.data)
        if step not in self._drawn:
            rate = self._rates[step]
            everything = zip(self.data, self._relative, self._hashes, strict=True)
            self._drawn[step] = [self._draw(*part, rate) for part in everything]
        return self._drawn[step]

    def _thins(self, step: int) -> bool:
        return step < _STEPS - 1 and self._errors[step] > 0

    def _step(self, error: float) -> int:
        return next((i for i, found in enumerate(self._errors) if found <= error), _STEPS - 1)

    @cached_property
    def _hashes(self) -> list[Tensor]:
        """A number 0 .. 1 for each unit, float64 of the shape of its costs."""
        hashes = []
        for o, cost in zip(self.data, self.costs, strict=True):
            keys = hashed(o.keys)  # hashed once more: a share of the tokens was drawn by this already
            if cost.dim() == 2:
                keys = keys[:, None] * _ROWS + torch.arange(cost.shape[1], device=cost.device)
            hashes.append(hashed(keys).double() / 2**31)
        return hashes

    def _in_means(self, o: Observations, cost: Tensor, matter: Tensor) -> Tensor:
        """Return costs in units of their mean over all ranks, 1 each without gradients, float64."""
        if o.weight is None or not self.mean_cost:
            return matter.double()
        return (cost.double() / self.mean_cost).clamp_(min=_FLOOR).mul_(matter)

    def _draw(self, o: Observations, relative: Tensor, hashes: Tensor, rate: float) -> Observations:
        if not len(o.keys):
            return o
        chance = _chance(relative, rate)
        chosen = hashes < chance
        if relative.dim() == 1:
            drawn, weights = o.select(chosen), 1 / chance[chosen]
        elif self.convolution is not None:
            drawn, weights = self._patches(o, chosen), 1 / chance[chosen]
        else:
            return _products(o, chosen, chance)
        if drawn.weight is None:
            return drawn
        return replace(drawn, weight=drawn.weight * weights.float().view(-1, *[1] * (drawn.weight.dim() - 1)))

    def _patches(self, o: Observations, chosen: Tensor) -> Observations:
        """Return the chosen output positions (B, H W) of a convolution as rows."""

        def rows(maps: Tensor) -> Tensor:
            return maps.flatten(2).transpose(1, 2)[chosen]

        drawn = []
        for i, picture in enumerate(o.inputs[0]):
            drawn.append(patches_of(picture[None], cast(nn.Module, self.convolution))[0].T[chosen[i]])
        weight = None if o.weight is None else rows(o.weight)
        return Observations(ROWS, (torch.cat(drawn),), chosen.nonzero()[:, 0], weight, rows(_known(o.target)))


def _products(o: Observations, chosen: Tensor, chance: Tensor) -> Observations:
    """Return matrix products with the chosen rows (P, M) of the left operand only.

    Products without any are left out; those with fewer rows than others are filled up with rows of weight 0.
    """
    some = chosen.any(1)
    most = max(1, int(chosen.sum(1).max())) if len(chosen) else 1
    rows = chosen[some].int().argsort(dim=1, descending=True, stable=True)[:, :most]  # (P', R)

    def gathered(x: Tensor) -> Tensor:
        return x[some].gather(1, rows[..., None].expand(-1, -1, x.shape[-1]))

    weights = gathered(torch.where(chosen, 1 / chance, 0).float()[..., None])
    left, right = o.inputs
    weight = weights if o.weight is None else gathered(o.weight) * weights
    return Observations(o.layout, (gathered(left), right[some]), o.keys[some], weight, gathered(_known(o.target)))


def patches_of(x: Tensor, layer: nn.Module) -> Tensor:
    """Return what each output position of a convolution sees of x (B, C, H, W): (B, C kh kw, H' W')."""
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)  # type: ignore[arg-type]
        return F.unfold(x, layer.kernel_size, layer.dilation, 0, layer.stride)  # type: ignore[arg-type]
    return F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # type: ignore[arg-type]


def _matters(o: Observations) -> Tensor:
    """Tell which units have an influence: a gradient, or without any a product."""
    return o.layout.unit_any(o.weight if o.weight is not None else _known(o.target))


def _chance(relative: Tensor, rate: "float | Tensor") -> Tensor:
    return (relative * rate).clamp_(max=1)


def _known(target: Tensor | None) -> Tensor:
    assert target is not None  # noqa: S101 - the search fills targets in before it draws
    return target
