"""Search the grids of one layer: both operands of its product together, from few units and candidates to all."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from lit_clipq.calibration.results import LayerResult
from lit_clipq.distributed import sum_over_ranks
from lit_clipq.errors import ConfigError
from lit_clipq.functional.distance import Distance, distance_from_sums, distance_sums, sums_of
from lit_clipq.functional.granularity import PerChannel, PerTensor, extrema
from lit_clipq.nn.layout import PATCHES
from lit_clipq.nn.modules import QModule, QWeighted
from lit_clipq.nn.registry import layout_of
from lit_clipq.search.candidates import Candidates
from lit_clipq.search.data import LayerData
from lit_clipq.search.grid import CandidateGrid
from lit_clipq.search.losses import ProductLosses
from lit_clipq.search.narrowing import Narrowing, Problem
from lit_clipq.search.sampling import Sampler


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


class LayerSearch:
    """The search of one layer's grids over what was observed of it.

    Args:
        data: What the layer saw; it is only read.
        module: Q-module in its float phase, in float32, with quantizers without parameters; by default that of
            the data.
        options: How to search.

    Raises:
        CalibrationError: If no rank observed anything, operands are not finite, or gradients are missing.
    """

    @torch.no_grad()
    def __init__(self, data: LayerData, options: SearchOptions, module: QModule | None = None) -> None:
        self.started = time.perf_counter()
        self.module, self.options, self.device = module or data.module, options, data.device
        self.candidates = self._candidates(data)
        self.rivals = {
            name: options.grid.of(quantizer, *data.range_of(self.module.operands.index(name)), device=self.device)
            for name, quantizer in self.module.rivals.items()
        }
        self.losses = ProductLosses(self.module, self.candidates, options.distance, self.device)
        self.data, self.unit = data.weighted(options.distance, factor=options.factored)
        self.problem = Problem(self.data, self.candidates, self.losses, self.device)

    @torch.no_grad()
    def run(self) -> LayerResult:
        """Search, give the quantizers their parameters, and say how it went."""
        problem = self.problem
        before, costs = self._assess()
        start = dict(problem.chosen)
        sampler = Sampler(self.data, costs, self.device, self._convolution) if not self.options.exhaustive else None
        if sampler is None:
            problem.alternate(rounds=3)
        elif problem.searched:
            Narrowing(problem, sampler, self.options.errors).coarse_to_fine()
        noise = torch.zeros(2, dtype=torch.float64, device=self.device)
        after, _ = self._assess(noise)
        if after > before:  # what is best on a sample may be worse on everything
            problem.chosen = start
            problem.alternate(rounds=1, reach=3)
            after, _ = self._assess(noise.zero_())
        after = self._refine(after, noise, sampler)
        signal, error = sum_over_ranks(noise).clamp(min=1e-300).tolist()
        sqnr_db = 10 * math.log10(signal / error)
        for name, family in self.candidates.items():
            family.commit(problem.chosen[name])
            if name in self.rivals and family.quantizer is self.rivals[name].quantizer:
                self.module.input_quantizers[name] = family.quantizer
        seconds = time.perf_counter() - self.started
        return LayerResult(before * self.unit, after * self.unit, sqnr_db, self._clipped(), seconds)

    def _refine(self, after: float, noise: Tensor, sampler: Sampler | None) -> float:
        """Search further parameters of grids that have some, and rival grids; what makes it no better is taken back.

        Args:
            after: The objective so far.
            noise: See `_assess`; of what is chosen in the end.
            sampler: Draws units; without one all are compared.

        Returns:
            The objective.
        """
        problem = self.problem
        more = any(family.then(problem.chosen[name]) is not None for name, family in self.candidates.items())
        if not (more or self.rivals):
            return after
        rough, fine = (list(self.data) if sampler is None else sampler.sample(e) for e in self.options.errors[1:])
        if more:
            after = self._attempt(lambda: problem.follow(rough, fine, every=sampler is None), after, noise)
        for name, family in self.rivals.items():
            after = self._attempt(partial(problem.take, name, family, rough, fine), after, noise)
        return after

    def _attempt(self, change: Callable[[], None], after: float, noise: Tensor) -> float:
        families, chosen, refined = dict(self.candidates), dict(self.problem.chosen), torch.zeros_like(noise)
        change()
        found, _ = self._assess(refined)
        if found < after:
            noise.copy_(refined)
            return found
        self.candidates.update(families)
        self.problem.chosen = chosen
        return after

    @property
    def _convolution(self) -> nn.Module | None:
        """The layer, if it is a convolution whose output positions are rows of a linear layer."""
        return self.module if layout_of(self.module) is PATCHES else None

    def _candidates(self, data: LayerData) -> dict[str, Candidates]:
        grid, module, found = self.options.grid, self.module, {}
        quantizer = module.weight_quantizer if isinstance(module, QWeighted) else None
        if isinstance(module, QWeighted) and quantizer is not None:
            weight, segments = module.weight.detach(), module.segments
            if isinstance(quantizer.granularity, PerTensor) and len(segments) > 1:
                quantizer.granularity = PerChannel(0)  # the channels of one projection share a scale
                low, high = (_shared(x, segments) for x in extrema(weight, quantizer.granularity))
                found["weight"] = grid.of(quantizer, low[0], high[1], segments, device=self.device)
            else:
                found["weight"] = grid.of(quantizer, *extrema(weight, quantizer.granularity), device=self.device)
        for i, name in enumerate(module.operands):
            operand = module.operand_quantizers.get(name)
            if operand is not None and isinstance(operand.granularity, PerChannel):
                data.range_of(i)  # says so if there is none
                low, high = data.channel_range_of(i, operand.granularity.axis)
                found[name] = grid.of(operand, low, high, (len(low),), device=self.device)
            elif operand is not None:
                found[name] = grid.of(operand, *data.range_of(i), device=self.device)
        return found

    def _assess(self, noise: Tensor | None = None) -> tuple[float, list[Tensor]]:
        """Return the objective of the chosen grids over all ranks, and what each unit of this rank costs.

        Args:
            noise: Squared norms of signal and error of this rank are added to it, float64 (2,).
        """
        kinds = sums_of(self.options.distance, per_channel=False)
        total = torch.zeros(kinds, 1, dtype=torch.float64, device=self.device)
        costs: list[list[Tensor]] = [[] for _ in self.data]
        for number, part, output in self.losses.outputs(self.data, *self.problem.pick()):
            o = self.data[number].select(part)
            target = cast(Tensor, o.target)
            if noise is not None:
                noise[0].add_(torch.linalg.vector_norm(target).double().square_())
                noise[1].add_(torch.dist(output, target).double().square_())
            total += distance_sums(
                output, target, o.weight, self.options.distance, axis=o.layout.channel_axis, per_channel=False
            )
            # output holds the weighted errors now; of a cosine it does not, but units are drawn alike there
            costs[number].append(o.layout.unit_costs(output))
        objective = distance_from_sums(sum_over_ranks(total), self.options.distance).item()
        return objective, [torch.cat(c) for c in costs]

    def _clipped(self) -> float:
        """Return the share of operand elements outside of their grids, over all ranks."""
        counts = torch.zeros(2, dtype=torch.float64, device=self.device)
        for i, name in enumerate(self.module.operands):
            family = self.candidates.get(name)
            limits = None if family is None else family.limits(self.problem.chosen[name])
            if limits is not None:
                low, high = limits
                for o in self.data:
                    x = o.inputs[i]
                    counts[0] += (x < low).sum() + (x > high).sum()
                    counts[1] += x.numel()
        clipped, elements = sum_over_ranks(counts).tolist()
        return clipped / elements if elements else 0.0


def _shared(values: Tensor, segments: tuple[int, ...]) -> Tensor:
    """Return (minimum, maximum) of each segment of values (channels,), repeated for its channels: (2, channels)."""
    parts = values.split(segments)
    return torch.cat([torch.stack(part.aminmax())[:, None].expand(2, len(part)) for part in parts], dim=1)
