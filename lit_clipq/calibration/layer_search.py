"""Search the grids of one layer: weight and operands in turn, each coarse to fine."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from lit_clipq.calibration.candidates import CandidateGrid, Candidates, UniformCandidates
from lit_clipq.calibration.collect import Observations
from lit_clipq.calibration.distributed import gather, sum_over_ranks
from lit_clipq.calibration.units import Draw, joined, thinned, with_influence
from lit_clipq.errors import CalibrationError
from lit_clipq.functional.distance import Distance, distance_from_sums, distance_sums, sums_of
from lit_clipq.functional.granularity import PerChannel, PerTensor, extrema
from lit_clipq.functional.search import (
    LINEAR_ROUNDS,
    PRODUCT_ROUNDS,
    TABLES,
    Round,
    Table,
    coarse_to_fine,
)
from lit_clipq.nn.modules import QConv2d, QModule, QWeighted

Operands = tuple[Tensor, ...]
_APART = 4  # candidates of the last operand in the first table


@dataclass(frozen=True)
class SearchOptions:
    """How grids are searched."""

    grid: CandidateGrid = field(default_factory=CandidateGrid)
    """Which candidates are offered."""
    tables: tuple[Table, ...] = TABLES
    """Comparisons of both operands at once, to begin with; with none, the search begins from min-max."""
    linear_rounds: tuple[Round, ...] = LINEAR_ROUNDS
    """Searches of a weight and its input in turn."""
    product_rounds: tuple[Round, ...] = PRODUCT_ROUNDS
    """Searches of the operands of an attention product in turn."""
    from_min_max: bool = False
    """Whether an operand that was not searched yet is rounded to its min-max grid, instead of left float, while others
    are searched."""
    distance: Distance = "hessian"
    """Weighted squared error, plain squared error, absolute error or 1 - cosine."""


@dataclass(frozen=True)
class LayerResult:
    """How the search of one layer went."""

    before: float
    """Objective of the min-max grids."""
    after: float
    """Objective of the grids found."""
    sqnr_db: float
    """Signal-to-noise ratio of the layer's output, unweighted, in dB."""
    clipped: float
    """Share of operand elements outside of their grids."""
    seconds: float
    """Wall time."""


class LayerSearch:
    """The search of one layer's grids over what was observed of it.

    Units whose output gradients are all zero count for the ranges but not for the objective.

    Args:
        module: Q-module in its float phase, in float32, with quantizers without parameters.
        seen: Observations of this rank, of which there may be none; the list is emptied.
        options: How to search.
        name: How errors call the layer.
        device: Where the ranks exchange; by default that of the weight or of the observations.

    Raises:
        CalibrationError: If no rank observed anything, operands are not finite, or gradients are missing.
    """

    @torch.no_grad()
    def __init__(
        self,
        module: QModule,
        seen: list[Observations],
        options: SearchOptions,
        *,
        name: str = "",
        device: torch.device | None = None,
    ) -> None:
        self.started = time.perf_counter()
        self.module, self.options, self.name = module, options, name
        self.weight = module.weight.detach() if isinstance(module, QWeighted) else None
        self.bias = module.bias.detach() if isinstance(module, QWeighted) and module.bias is not None else None
        found = (self.weight, *(x for o in seen for x in o.inputs))
        self.device = device or next((x.device for x in found if x is not None), torch.device("cpu"))
        self.data = joined(seen)
        self.candidates = self._candidates(self.data)
        self.spans: dict[str, tuple[int, int]] = {}  # of operands that count as float, because they were not searched
        self._start_from_min_max()
        self.unit = 1.0
        if options.distance == "hessian":
            if any(o.weight is None for o in self.data):
                raise CalibrationError(f"the Hessian-weighted distance of {name} needs output gradients, got none")
            self.data = with_influence(self.data)
            self.unit = self._unit()
        for o in self.data:
            o.inputs = tuple(x.float() for x in o.inputs)
            o.weight = o.weight.float() / self.unit if options.distance == "hessian" and o.weight is not None else None
            o.target = self._product(o.inputs, self.weight, self.bias) if o.target is None else o.target

    @torch.no_grad()
    def run(self) -> LayerResult:
        """Search, give the quantizers their parameters, and say how it went."""
        before, costs = self._assess()
        draw = Draw(self.data, costs, self.device, self._convolution)
        if not self.options.from_min_max:
            self.spans = {name: (0, self.candidates[name].count - 1) for name in self._searched}
        self._search_jointly(self.options.tables, draw)
        for round_ in self.options.product_rounds if self.weight is None else self.options.linear_rounds:
            self._search(round_, draw)
        after, sqnr_db, clipped = self._judge()
        if after > before:  # what is best on a sample may be worse on everything
            self._start_from_min_max()
            self._search(Round(), draw)
            after, sqnr_db, clipped = self._judge()
        for name, family in self.candidates.items():
            family.commit(self.chosen[name])
        return LayerResult(before * self.unit, after * self.unit, sqnr_db, clipped, time.perf_counter() - self.started)

    @torch.no_grad()
    def mean_error(self) -> Tensor:
        """Return E[O^ - O] of each output channel, float32 (channels,), over all ranks; after `run`."""
        channels = cast(Tensor, self.weight).shape[0]
        total = torch.zeros(channels + 1, dtype=torch.float64, device=self.device)
        weight = self._rounded_weight()
        for o in self.data:
            error = self._product(self._rounded_inputs(o), weight, self.bias) - cast(Tensor, o.target)
            rows = error.movedim(_channel_axis(o), -1).reshape(-1, channels)
            total[:-1] += rows.sum(0, dtype=torch.float64)
            total[-1] += len(rows)
        total = sum_over_ranks(total)
        return (total[:-1] / total[-1].clamp(min=1)).float()

    def _unit(self) -> float:
        """Return the power of two below the largest weight of an error, over all ranks.

        Divided by it, weighted errors stay clear of subnormal numbers, on which processors are ten times slower.
        """
        largest = [float(o.weight.max()) for o in self.data if o.weight is not None and len(o.keys)]
        top = max((x for rank in gather(largest) for x in rank), default=0.0)
        return 2.0 ** math.floor(math.log2(top)) if top > 0 else 1.0

    @property
    def _convolution(self) -> QConv2d | None:
        """The layer, if it is a convolution whose output positions are rows of a linear layer."""
        return self.module if isinstance(self.module, QConv2d) and self.module.groups == 1 else None

    @property
    def _searched(self) -> list[str]:
        """Operands with more than one candidate: the weight first."""
        return [name for name, family in self.candidates.items() if family.count > 1]

    def _start_from_min_max(self) -> None:
        self.chosen = {name: family.start for name, family in self.candidates.items()}
        self.spans = {}

    def _search_jointly(self, tables: tuple[Table, ...], draw: Draw) -> None:
        """Choose where to begin: the last operand's grid whose best partner is the best."""
        if self._searched[:1] != ["weight"] or len(self._searched) != 2 or not tables:
            return
        if isinstance(self.module, QConv2d) and self._convolution is None:
            return
        _, last = self._searched
        count = self.candidates[last].count
        inputs = torch.arange(_APART // 2, count, _APART, device=self.device)
        for table in tables:
            losses = self._table(inputs, draw, table)
            best = losses.amin(0).sum(-1).argsort(stable=True)[: table.keep]
            partners = losses[:, best[0]].argmin(0) * table.spacing
            around = torch.arange(-table.spread, table.spread + 1, device=self.device)
            inputs = (inputs[best, None] + around).clamp(0, count - 1).flatten()
        self.chosen[last] = inputs[:1]
        low, high = torch.stack(partners.aminmax()).tolist()
        self.spans = {"weight": (low, min(high + table.spacing, self.candidates["weight"].count) - 1)}

    def _table(self, inputs: Tensor, draw: Draw, table: Table) -> Tensor:
        """Return the objective, float64 (M, X, C), by the weight's candidates and the given ones (X,) of the input."""
        weight, last = cast(Tensor, self.weight), self._searched[1]
        data = draw.about(table.sample)
        rows = not isinstance(self.module, QConv2d) or draw.thins(table.sample)
        step = max(1, len(weight) // table.channels) if rows else 1
        data = thinned(data, step) if step > 1 else data
        family, offered = self.candidates["weight"].every(step), self.candidates[last]
        weight, bias = weight[::step], None if self.bias is None else self.bias[::step]
        rounded = [[offered.apply(o.inputs[0], x[None]) for x in inputs] for o in data]
        losses = []
        for index in range(table.spacing // 2, family.count, table.spacing):
            candidate = family.apply(weight, torch.full((family.channels,), index, device=self.device))
            sums = torch.stack([self._zeros(len(weight), per_channel=True)] * len(inputs))
            for o, operands in zip(data, rounded, strict=True):
                for i, x in enumerate(operands):
                    sums[i] += self._compare(self._product((x,), candidate, bias), o, per_channel=True)
            losses.append(distance_from_sums(sum_over_ranks(family.pooled(sums)), self.options.distance))
        return torch.stack(losses)

    def _search(self, round_: Round, draw: Draw) -> None:
        """Search one operand after the other."""
        for name in self._searched:
            evaluate, recheck = (self._evaluator(name, draw.about(n)) for n in (round_.sample, round_.recheck))
            self.chosen[name] = coarse_to_fine(
                evaluate,
                self.candidates[name].count,
                self.chosen[name],
                round_,
                span=self.spans.pop(name, None),
                recheck=recheck if round_.finalists > 1 else None,
            )

    def _candidates(self, data: list[Observations]) -> dict[str, Candidates]:
        grid, module, found = self.options.grid, self.module, {}
        quantizer = module.weight_quantizer if isinstance(module, QWeighted) else None
        if self.weight is not None and quantizer is not None:
            segments = tuple(getattr(module, "segments", ()))
            if isinstance(quantizer.granularity, PerTensor) and len(segments) > 1:
                quantizer.granularity = PerChannel(0)  # the channels of one projection share a scale
                low, high = (_shared(x, segments) for x in extrema(self.weight, quantizer.granularity))
                found["weight"] = grid.of(quantizer, low[0], high[1], segments)
            else:
                found["weight"] = grid.of(quantizer, *extrema(self.weight, quantizer.granularity))
        for i, name in enumerate(module.operands):
            operand = module.operand_quantizers.get(name)
            if operand is not None:
                found[name] = grid.of(operand, *self._range(data, i))
        return found

    def _range(self, data: list[Observations], operand: int) -> tuple[Tensor, Tensor]:
        own = [torch.stack(extrema(o.inputs[operand].float(), PerTensor())).cpu() for o in data if len(o.keys)]
        pieces = [piece for rank in gather(own) for piece in rank]
        if not pieces:
            raise CalibrationError(
                f"layer {self.name} saw 0 calibration batches; give batches that reach it (pictures for the image "
                "tower, texts for the text tower) or exclude it"
            )
        low, high = torch.stack(pieces).unbind(1)
        if not bool((low.isfinite() & high.isfinite()).all()):
            raise CalibrationError(
                f"layer {self.name} received NaN or Inf in calibration; check the calibration samples and the weights "
                "in front of it"
            )
        return low.min().to(self.device), high.max().to(self.device)

    def _product(self, inputs: Operands, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Return the product; rows or patches of a convolution go through it as through a linear layer."""
        if weight is None:
            return inputs[0] @ inputs[1]
        x = inputs[0]
        if x.dim() < 4:  # the rows of a linear layer, or patches
            return torch.nn.functional.linear(x, weight.flatten(1), bias)
        return nn.Conv2d._conv_forward(cast(nn.Conv2d, self.module), x, weight, bias)

    def _rounded_weight(self) -> Tensor | None:
        return None if self.weight is None else self._rounded("weight", self.weight)

    def _rounded_inputs(self, o: Observations, skip: str = "") -> Operands:
        return tuple(
            x if name == skip else self._rounded(name, x)
            for name, x in zip(self.module.operands, o.inputs, strict=True)
        )

    def _rounded(self, name: str, x: Tensor) -> Tensor:
        if name in self.spans or name not in self.candidates:
            return x
        return self.candidates[name].apply(x, self.chosen[name])

    def _evaluator(self, name: str, data: list[Observations]) -> Callable[[Tensor], Tensor]:
        """Return the objective by the indices of operand `name`, the others as chosen so far."""
        family, of_weight = self.candidates[name], name == "weight"
        inputs = [self._rounded_inputs(o, skip=name) for o in data]
        weight = self.weight if of_weight else self._rounded_weight()
        place = 0 if of_weight else self.module.operands.index(name)

        def evaluate(index: Tensor) -> Tensor:
            candidate = family.apply(self.weight, index) if of_weight and self.weight is not None else weight
            sums = self._zeros(len(weight) if of_weight and weight is not None else 1, per_channel=of_weight)
            for operands, o in zip(inputs, data, strict=True):
                if not of_weight:
                    operands = (*operands[:place], family.apply(operands[place], index), *operands[place + 1 :])
                sums += self._compare(self._product(operands, candidate, self.bias), o, per_channel=of_weight)
            return distance_from_sums(sum_over_ranks(family.pooled(sums)), self.options.distance)

        return evaluate

    def _zeros(self, channels: int = 1, *, per_channel: bool = False) -> Tensor:
        """Return sums of nothing, which is what a rank without observations has."""
        kinds = sums_of(self.options.distance, per_channel=per_channel)
        return torch.zeros(kinds, channels, dtype=torch.float64, device=self.device)

    def _compare(self, output: Tensor, o: Observations, *, per_channel: bool) -> Tensor:
        return distance_sums(
            output,
            cast(Tensor, o.target),
            o.weight,
            self.options.distance,
            axis=_channel_axis(o),
            per_channel=per_channel,
        )

    def _assess(self) -> tuple[float, list[Tensor]]:
        """Return the objective of the chosen grids over all ranks, and what each unit of this rank costs."""
        total, costs, weight = self._zeros(), [], self._rounded_weight()
        for o in self.data:
            cost = self._product(self._rounded_inputs(o), weight, self.bias)
            total += self._compare(cost, o, per_channel=False)
            # cost holds the weighted squared errors now
            by_position = cost.dim() == 4 and self._convolution is not None
            costs.append(cost.sum(1).flatten(1) if by_position else cost.flatten(1).sum(1))
        return distance_from_sums(sum_over_ranks(total), self.options.distance).item(), costs

    def _judge(self) -> tuple[float, float, float]:
        """Return (objective, SQNR in dB, share of clipped operand elements) of the chosen grids over all ranks."""
        total, weight = self._zeros(), self._rounded_weight()
        sums = torch.zeros(4, dtype=torch.float64, device=self.device)  # signal, noise, clipped, elements
        for o in self.data:
            rounded, target = self._rounded_inputs(o), cast(Tensor, o.target)
            output = self._product(rounded, weight, self.bias)
            for i, x in enumerate((target, output - target)):
                sums[i] += x.square().flatten(0, -2).sum(0).sum(dtype=torch.float64)
            total += self._compare(output, o, per_channel=False)
            for name, x, r in zip(self.module.operands, o.inputs, rounded, strict=True):
                family = self.candidates.get(name)
                if isinstance(family, UniformCandidates):
                    sums[2] += ((x - r).abs_() > family.scale_of(self.chosen[name]) * 0.5001).sum()
                    sums[3] += x.numel()
        signal, noise, clipped, elements = sum_over_ranks(sums).tolist()
        objective = distance_from_sums(sum_over_ranks(total), self.options.distance).item()
        sqnr = 10 * math.log10(max(signal, 1e-300) / max(noise, 1e-300))
        return objective, sqnr, clipped / elements if elements else 0.0


def _channel_axis(o: Observations) -> int:
    return -3 if cast(Tensor, o.target).dim() == 4 else -1


def _shared(values: Tensor, segments: tuple[int, ...]) -> Tensor:
    """Return (minimum, maximum) of each segment of values (channels,), repeated for its channels: (2, channels)."""
    parts = values.split(segments)
    return torch.cat([torch.stack(part.aminmax())[:, None].expand(2, len(part)) for part in parts], dim=1)


def summarise(results: Mapping[str, LayerResult], worst: int = 5) -> list[str]:
    """Name the layers with the lowest signal-to-noise ratio, worst first."""
    return sorted(results, key=lambda name: results[name].sqnr_db)[:worst]
