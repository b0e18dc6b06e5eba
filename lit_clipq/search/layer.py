"""Search the grids of one layer: both operands of its product together, from few units and candidates to all."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from lit_clipq.calibration.collect import Observations
from lit_clipq.distributed import gather, sum_over_ranks
from lit_clipq.errors import CalibrationError, ConfigError
from lit_clipq.functional.distance import Distance, distance_from_sums, distance_sums, sums_of
from lit_clipq.functional.granularity import PerChannel, PerTensor, extrema
from lit_clipq.nn.modules import QConv2d, QModule, QWeighted
from lit_clipq.search.candidates import CandidateGrid, Candidates, UniformCandidates
from lit_clipq.search.losses import Comparison, channel_axis
from lit_clipq.search.sampling import Draw, factor_weights, joined, with_influence
from lit_clipq.search.selection import around, best_first, spaced, valley

_CHANNELS = 192  # of a weight, evenly spread, that stand for all in the first tables
_SPACING = 8  # of the candidates in them
_SLACK = 1.4  # times the lowest loss: what may still hold the best candidate
_LITTLE = 1.05  # times the lowest loss of a pair: what of the second operand may still hold the best
_LOOKS = 10  # candidates of each operand in the table of both
_FINALISTS = 4  # candidates that are compared on more data


@dataclass(frozen=True)
class SearchOptions:
    """How grids are searched."""

    grid: CandidateGrid = field(default_factory=CandidateGrid)
    """Which candidates are offered."""
    distance: Distance = "hessian"
    """Weighted squared error, plain squared error, absolute error or 1 - cosine."""
    factored: bool = True
    """Whether the squared gradients of a layer with a weight are replaced by the product of their means over channels
    and over rows (the form of Adafactor's second moments, arXiv 1804.04235): a draw is noisy, and the scale of a single
    channel would follow its noise."""
    exhaustive: bool = False
    """Whether every candidate of one operand after the other is compared on all data, three times over, beginning from
    min-max: the procedure of PTQ4ViT."""
    errors: tuple[float, float, float] = (0.1, 0.05, 0.025)
    """Relative standard errors of the objectives that say where to look, that give most candidates up, and that compare
    the last ones: each is computed on as few units as it allows."""

    def __post_init__(self) -> None:
        if len(self.errors) != 3 or not all(isinstance(e, int | float) and e >= 0 for e in self.errors):
            raise ConfigError(f"errors must be three numbers of at least 0, got {self.errors}")
        if list(self.errors) != sorted(self.errors, reverse=True):
            raise ConfigError(f"errors must not grow from one to the next, got {self.errors}")
        object.__setattr__(self, "errors", tuple(float(e) for e in self.errors))


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
        weight = module.weight.detach() if isinstance(module, QWeighted) else None
        found = (weight, *(x for o in seen for x in o.inputs))
        self.device = device or next((x.device for x in found if x is not None), torch.device("cpu"))
        self.data = joined(seen)
        self.candidates = self._candidates(self.data, weight)
        self.comparison = Comparison(module, self.candidates, options.distance, self.device)
        self.first, self.second = self.comparison.names
        self.chosen = {name: family.start for name, family in self.candidates.items()}
        self.unit = 1.0
        if options.distance == "hessian":
            if any(o.weight is None for o in self.data):
                raise CalibrationError(f"the Hessian-weighted distance of {name} needs output gradients, got none")
            self.data = with_influence(self.data)
            if options.factored and self.comparison.weight is not None:
                factor_weights(self.data, len(self.comparison.weight), self.device)
            self.unit = self._unit()
        for o in self.data:
            o.inputs = tuple(x.float() for x in o.inputs)
            o.weight = o.weight.float() / self.unit if options.distance == "hessian" and o.weight is not None else None
            o.target = self.comparison.targets(o) if o.target is None else o.target

    @torch.no_grad()
    def run(self) -> LayerResult:
        """Search, give the quantizers their parameters, and say how it went."""
        before, costs = self._assess()
        start = dict(self.chosen)
        if self.options.exhaustive:
            self._alternate(rounds=3)
        elif self._searched:
            self._narrow(Draw(self.data, costs, self.device, self._convolution))
        noise = torch.zeros(2, dtype=torch.float64, device=self.device)
        after, _ = self._assess(noise)
        if after > before:  # what is best on a sample may be worse on everything
            self.chosen = start
            self._alternate(rounds=1, reach=3)
            after, _ = self._assess(noise.zero_())
        signal, error = sum_over_ranks(noise).clamp(min=1e-300).tolist()
        sqnr_db = 10 * math.log10(signal / error)
        for name, family in self.candidates.items():
            family.commit(self.chosen[name])
        seconds = time.perf_counter() - self.started
        return LayerResult(before * self.unit, after * self.unit, sqnr_db, self._clipped(), seconds)

    @torch.no_grad()
    def mean_error(self) -> Tensor:
        """Return E[O^ - O] of each output channel, float32 (channels,), over all ranks; after `run`."""
        channels = len(cast(Tensor, self.comparison.weight))
        total = torch.zeros(channels + 1, dtype=torch.float64, device=self.device)
        for number, part, output in self.comparison.outputs(self.data, *self._pick()):
            target = cast(Tensor, self.data[number].target)[part]
            rows = (output - target).movedim(channel_axis(target), -1).reshape(-1, channels)
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

    def _candidates(self, data: list[Observations], weight: Tensor | None) -> dict[str, Candidates]:
        grid, module, found = self.options.grid, self.module, {}
        quantizer = module.weight_quantizer if isinstance(module, QWeighted) else None
        if weight is not None and quantizer is not None:
            segments = tuple(getattr(module, "segments", ()))
            if isinstance(quantizer.granularity, PerTensor) and len(segments) > 1:
                quantizer.granularity = PerChannel(0)  # the channels of one projection share a scale
                low, high = (_shared(x, segments) for x in extrema(weight, quantizer.granularity))
                found["weight"] = grid.of(quantizer, low[0], high[1], segments, device=self.device)
            else:
                found["weight"] = grid.of(quantizer, *extrema(weight, quantizer.granularity), device=self.device)
        for i, name in enumerate(module.operands):
            operand = module.operand_quantizers.get(name)
            if operand is not None:
                found[name] = grid.of(operand, *self._range(data, i), device=self.device)
        return found

    def _range(self, data: list[Observations], operand: int) -> tuple[Tensor, Tensor]:
        """Return minimum and maximum of an operand over all ranks, on the CPU."""
        own = [o.range_of(operand).cpu() for o in data if len(o.keys) or o.ranges is not None]
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
        return low.min(), high.max()

    @property
    def _searched(self) -> list[str]:
        """Operands with more than one candidate: the weight first."""
        return [name for name, family in self.candidates.items() if family.count > 1]

    def _pick(self) -> tuple[Tensor, Tensor]:
        """Return what is chosen of the two operands, (1, channels) each; of one that stays float anything."""
        nothing = torch.zeros(1, dtype=torch.int64, device=self.device)
        first, second = (self.chosen.get(name, nothing)[None] for name in (self.first, self.second))
        return first, second

    def _alternate(self, rounds: int, reach: int | None = None) -> None:
        """Search one operand after the other on all data: every candidate, or those within reach of the chosen one."""
        for _ in range(rounds):
            for name in self._searched:
                family, chosen = self.candidates[name], self.chosen[name][None]
                if reach is None:
                    everything = torch.arange(family.count, device=chosen.device)[:, None]
                    offers = torch.cat([chosen, everything.expand(-1, family.channels)])
                else:
                    offers = around(chosen, reach, family.count)
                self.chosen[name] = best_first(offers, self._losses(name, offers, self.data))[0]

    def _narrow(self, draw: Draw) -> None:
        """Search from coarse tables on few units to the last candidates on many."""
        coarse, rough, fine = (draw.about(error) for error in self.options.errors)
        if len(self._searched) == 1:
            (name,) = self._searched
            self._screen(name, (0, self.candidates[name].count - 1), rough, fine)
        elif self.comparison.weight is None:
            for name, span in self._meet(coarse, step=1).items():
                self._screen(name, span, rough, fine)
            self._settle(fine)
        else:
            step = max(1, self.candidates[self.first].channels // _CHANNELS) if self._by_rows(draw) else 1
            spans = self._meet(coarse, step)
            self._settle_input(spans, rough, step)
            self._screen(self.first, spans[self.first], rough, fine)

    def _by_rows(self, draw: Draw) -> bool:
        """Tell, on every rank alike, whether what is drawn are rows, of which every n-th channel can be computed."""
        return not isinstance(self.module, QConv2d) or draw.by_rows(self.options.errors[1])

    def _meet(self, data: list[Observations], step: int) -> dict[str, tuple[int, int]]:
        """Choose the pair that is the best of a coarse table; return where to look on.

        Each operand alone, the other in float, tells where its valley is. The objective of a grid of the second one is
        the sum over channels of the minimum over the first one's grids.
        """
        f_all, s_all = (spaced(0, self.candidates[name].count - 1, _SPACING) for name in (self.first, self.second))
        f_span = _between(f_all, valley(self._table(data, f_all, None, step)[:, 0], _SLACK))
        s_span = _between(s_all, valley(self._table(data, None, s_all, step).sum(-1).T, _SLACK))
        f_some, s_some = (spaced(*span, max(1, (span[1] - span[0]) // _LOOKS)) for span in (f_span, s_span))
        losses = self._table(data, f_some, s_some, step)
        paired = losses.amin(0).sum(-1)
        best = int(paired.argmin())
        self._choose(self.second, s_some[best])
        s_span = _between(s_some, valley(paired[:, None], _LITTLE))
        partners = losses[:, best]
        if self.comparison.weight is None:
            self._choose(self.first, f_some[int(partners.argmin())])
        f_span = _between(f_some, valley(partners, _LITTLE if self.comparison.weight is None else _SLACK))
        return {self.first: f_span, self.second: s_span}

    def _settle_input(self, spans: dict[str, tuple[int, int]], data: list[Observations], step: int) -> None:
        """Choose the grid of a layer's input.

        What a weight that adapts to it makes good is known from every n-th channel, which stands for all; what it costs
        by itself, from all of them.
        """
        offers, partners = spaced(*spans[self.second], 1), spaced(*spans[self.first], 2)
        adapted = self._table(data, partners, offers, step).amin(0).sum(-1)
        exact = self._table(data, None, offers, 1)[0]
        alone, exact = exact[:, ::step].sum(-1), exact.sum(-1)
        stand_for = exact.sum() / alone.sum() if alone.sum() > 0 else 1.0
        estimate = exact + (adapted - alone) * stand_for
        self._choose(self.second, offers[int(estimate.argmin())])

    def _settle(self, data: list[Observations]) -> None:
        """Choose among the pairs around the chosen one: the best on drawn units, then on all of them."""
        near = [
            around(self.chosen[name][None], 2, self.candidates[name].count).unique(dim=0) for name in self._searched
        ]
        losses = self.comparison.losses(data, *near)[..., 0]
        pairs = losses.flatten().argsort(stable=True)[:_FINALISTS]
        firsts, seconds = near[0][pairs // losses.shape[1]], near[1][pairs % losses.shape[1]]
        exact = [self.comparison.losses(self.data, f[None], s[None]) for f, s in zip(firsts, seconds, strict=True)]
        best = torch.cat(exact).flatten().argmin()
        self.chosen = {self.first: firsts[best], self.second: seconds[best]}

    def _screen(self, name: str, span: tuple[int, int], rough: list[Observations], fine: list[Observations]) -> None:
        """Choose one operand's candidate, the other's as chosen: the best of a span on few units, then on more."""
        offers = torch.arange(span[0], span[1] + 1, device=self.device)[:, None]
        offers = offers.expand(-1, self.candidates[name].channels)
        offers = best_first(offers, self._losses(name, offers, rough))[:_FINALISTS]
        offers = torch.cat([self.chosen[name][None], offers])
        self.chosen[name] = best_first(offers, self._losses(name, offers, fine))[0]

    def _choose(self, name: str, candidate: int) -> None:
        """Choose one candidate for all channels."""
        self.chosen[name] = torch.full_like(self.chosen[name], candidate)

    def _table(
        self, data: list[Observations], first: Sequence[int] | None, second: Sequence[int] | None, step: int
    ) -> Tensor:
        """Return losses (A, B, channels), on the CPU, of candidates A for all channels and B; `None` is float."""
        columns = [None if x is None else torch.tensor(x, device=self.device)[:, None] for x in (first, second)]
        if columns[0] is not None:
            columns[0] = columns[0].expand(-1, self.candidates[self.first].every(step).channels)
        return self.comparison.losses(data, *columns, step=step).cpu()

    def _losses(self, name: str, offers: Tensor, data: list[Observations]) -> Tensor:
        """Return losses (A, channels) of one operand's offers, the other as chosen."""
        pair = (offers, self._pick()[1]) if name == self.first else (self._pick()[0], offers)
        losses = self.comparison.losses(data, *pair, per_channel=name == self.first)
        return losses[:, 0] if name == self.first else losses[0]

    def _assess(self, noise: Tensor | None = None) -> tuple[float, list[Tensor]]:
        """Return the objective of the chosen grids over all ranks, and what each unit of this rank costs.

        Args:
            noise: Squared norms of signal and error of this rank are added to it, float64 (2,).
        """
        kinds = sums_of(self.options.distance, per_channel=False)
        total = torch.zeros(kinds, 1, dtype=torch.float64, device=self.device)
        costs: list[list[Tensor]] = [[] for _ in self.data]
        for number, part, output in self.comparison.outputs(self.data, *self._pick()):
            o = self.data[number].select(part)
            target = cast(Tensor, o.target)
            if noise is not None:
                noise[0].add_(torch.linalg.vector_norm(target).double().square_())
                noise[1].add_(torch.dist(output, target).double().square_())
            total += distance_sums(
                output, target, o.weight, self.options.distance, axis=channel_axis(target), per_channel=False
            )
            # output holds the weighted errors now; of a cosine it does not, but units are drawn alike there
            if output.dim() == 3:
                costs[number].append(output.sum(2))
            elif self._convolution is not None:
                costs[number].append(output.sum(1).flatten(1))
            else:
                costs[number].append(output.flatten(1).sum(1))
        objective = distance_from_sums(sum_over_ranks(total), self.options.distance).item()
        return objective, [torch.cat(c) for c in costs]

    def _clipped(self) -> float:
        """Return the share of operand elements outside of their grids, over all ranks."""
        counts = torch.zeros(2, dtype=torch.float64, device=self.device)
        for i, name in enumerate(self.module.operands):
            family = self.candidates.get(name)
            if isinstance(family, UniformCandidates):
                low, high = family.limits(self.chosen[name])
                for o in self.data:
                    x = o.inputs[i]
                    counts[0] += (x < low).sum() + (x > high).sum()
                    counts[1] += x.numel()
        clipped, elements = sum_over_ranks(counts).tolist()
        return clipped / elements if elements else 0.0


def _between(candidates: Sequence[int], places: tuple[int, int]) -> tuple[int, int]:
    return candidates[places[0]], candidates[places[1]]


def _shared(values: Tensor, segments: tuple[int, ...]) -> Tensor:
    """Return (minimum, maximum) of each segment of values (channels,), repeated for its channels: (2, channels)."""
    parts = values.split(segments)
    return torch.cat([torch.stack(part.aminmax())[:, None].expand(2, len(part)) for part in parts], dim=1)


def summarise(results: Mapping[str, LayerResult], worst: int = 5) -> list[str]:
    """Name the layers with the lowest signal-to-noise ratio, worst first."""
    return sorted(results, key=lambda name: results[name].sqnr_db)[:worst]
