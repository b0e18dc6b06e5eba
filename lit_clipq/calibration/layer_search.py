"""Search the grids of one layer: weight and operands in turn, each coarse to fine."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, cast

import torch
from torch import Tensor
from torch import distributed as dist

from lit_clipq.calibration.candidates import CandidateGrid, Candidates
from lit_clipq.calibration.collect import Observations
from lit_clipq.calibration.distributed import gather
from lit_clipq.errors import CalibrationError
from lit_clipq.functional.granularity import PerChannel, PerTensor, extrema
from lit_clipq.functional.search import COARSE_TO_FINE, Round, coarse_to_fine
from lit_clipq.nn.modules import QConv2d, QModule, QWeighted
from lit_clipq.nn.quantizer import UniformQuantizer

Distance = Literal["hessian", "l2", "l1", "cosine"]


@dataclass(frozen=True)
class SearchOptions:
    """How grids are searched."""

    grid: CandidateGrid = field(default_factory=CandidateGrid)
    """Which candidates are offered."""
    rounds: tuple[Round, ...] = COARSE_TO_FINE
    """In which order they are tried; weight and operands are searched in turn in each round."""
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

    Args:
        module: Q-module in its float phase, with quantizers without parameters.
        seen: Observations of this rank; a rank may have none.
        options: How to search.
    """

    def __init__(self, module: QModule, seen: list[Observations], options: SearchOptions) -> None:
        self.module = module
        self.options = options
        self.all = _merge(seen)
        for seen_ in self.all:
            if seen_.target is None:
                seen_.target = self._product(seen_.inputs)
        self.weight_axis = 1 if isinstance(module, QConv2d) else -1
        self.candidates = self._candidates()
        self.chosen = {name: family.start for name, family in self.candidates.items()}

    @torch.no_grad()
    def run(self) -> LayerResult:
        """Search, give the quantizers their parameters, and say how it went."""
        started = time.perf_counter()
        before = self._total(self._loss("", None, self.all))
        for round_ in self.options.rounds:
            data = self.all if round_.sample == 1 else [_sampled(o, round_.sample) for o in self.all]
            for name, family in self.candidates.items():
                if family.count > 1:
                    evaluate = self._evaluator(name, data, round_.alone)
                    self.chosen[name] = coarse_to_fine(evaluate, family.count, self.chosen[name], round_)
        after = self._total(self._loss("", None, self.all))
        if after > before:  # what is best on the sample may be worse on everything
            after = before
            self.chosen = {name: family.start for name, family in self.candidates.items()}
        for name, family in self.candidates.items():
            family.commit(self.chosen[name])
        return LayerResult(before, after, *self._quality(), time.perf_counter() - started)

    @torch.no_grad()
    def mean_error(self) -> Tensor:
        """Return E[O^ - O] of each output channel, float32 (channels,), over all ranks; after `run`."""
        channels = cast(QWeighted, self.module).weight.shape[0]
        total = torch.zeros(channels + 1, dtype=torch.float64, device=self._device())
        weight = self._rounded_weight()
        for seen in self.all:
            error = self._product(self._rounded_inputs(seen, skip=""), weight) - cast(Tensor, seen.target)
            rows = error.movedim(self.weight_axis, -1).reshape(-1, channels)
            total[:-1] += rows.sum(0, dtype=torch.float64)
            total[-1] += len(rows)
        total = _sum_over_ranks(total)
        return (total[:-1] / total[-1].clamp(min=1)).float()

    def _candidates(self) -> dict[str, Candidates]:
        grid, module, found = self.options.grid, self.module, {}
        if isinstance(module, QWeighted) and module.weight_quantizer is not None:
            weight, quantizer = module.weight.detach(), module.weight_quantizer
            ties = None
            if isinstance(quantizer.granularity, PerTensor) and isinstance(quantizer, UniformQuantizer):
                ties = _segments(module)
                quantizer.granularity = PerChannel(0)
            low, high = extrema(weight, quantizer.granularity)
            if ties is not None:
                low = torch.stack([low[ties == i].min() for i in range(int(ties.max()) + 1)])[ties]
                high = torch.stack([high[ties == i].max() for i in range(int(ties.max()) + 1)])[ties]
            found["weight"] = grid.of(quantizer, low, high, ties)
        for i, name in enumerate(module.operands):
            if name in module.operand_quantizers:
                low, high = self._range(i)
                found[name] = grid.of(module.operand_quantizers[name], low, high)
        return found

    def _range(self, operand: int) -> tuple[Tensor, Tensor]:
        own = [extrema(o.inputs[operand].float(), PerTensor()) for o in self.all]
        pieces = [(low.cpu(), high.cpu()) for low, high in own]
        everyone = [piece for rank in gather(pieces) for piece in rank]
        if not everyone:
            raise CalibrationError("a layer saw 0 calibration batches; give batches that reach it or exclude it")
        device = self._device()
        return (
            torch.stack([low for low, _ in everyone]).min().to(device),
            torch.stack([high for _, high in everyone]).max().to(device),
        )

    def _device(self) -> torch.device:
        if isinstance(self.module, QWeighted):
            return self.module.weight.device
        return self.all[0].inputs[0].device if self.all else torch.device("cpu")

    def _product(self, inputs: tuple[Tensor, ...], weight: Tensor | None = None) -> Tensor:
        operands = tuple(x.float() for x in inputs)
        if isinstance(self.module, QWeighted):
            return self.module.product_with(weight if weight is not None else self.module.weight.detach(), *operands)
        return self.module.product(*operands)

    def _evaluator(self, name: str, data: list[Observations], alone: bool) -> Callable[[Tensor], Tensor]:
        """Return the objective by the indices of operand `name`; everything else is rounded once, or float."""
        if alone:
            rounded = [tuple(x.float() for x in seen.inputs) for seen in data]
            weight = self.module.weight.detach() if isinstance(self.module, QWeighted) else None
        else:
            rounded = [self._rounded_inputs(seen, skip=name) for seen in data]
            weight = self._rounded_weight() if name != "weight" else None
        return lambda index: self._loss(name, index, data, inputs=rounded, weight=weight)

    def _rounded_weight(self) -> Tensor | None:
        if not isinstance(self.module, QWeighted):
            return None
        weight = self.module.weight.detach()
        if "weight" in self.candidates:
            return self.candidates["weight"].apply(weight, self.chosen["weight"])
        return weight

    def _rounded_inputs(self, seen: Observations, skip: str) -> tuple[Tensor, ...]:
        return tuple(
            x.float()
            if name == skip or name not in self.candidates
            else self.candidates[name].apply(x.float(), self.chosen[name])
            for name, x in zip(self.module.operands, seen.inputs, strict=True)
        )

    def _loss(
        self,
        name: str,
        index: Tensor | None,
        data: list[Observations],
        *,
        inputs: list[tuple[Tensor, ...]] | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """Return the objective over all ranks, float64 (channels of operand `name`,), with it rounded by `index`."""
        family = self.candidates.get(name)
        channels = family.channels if family is not None else 1
        if name == "weight" and family is not None and index is not None:
            weight = family.apply(cast(QWeighted, self.module).weight.detach(), index)
        elif weight is None:
            weight = self._rounded_weight()
        total = torch.zeros(channels, dtype=torch.float64, device=self._device())
        for i, seen in enumerate(data):
            operands = inputs[i] if inputs is not None else self._rounded_inputs(seen, skip="")
            if name and name != "weight" and family is not None and index is not None:
                operands = tuple(
                    family.apply(x, index) if operand == name else x
                    for operand, x in zip(self.module.operands, operands, strict=True)
                )
            output = self._product(operands, weight)
            loss = self._distance(output, cast(Tensor, seen.target), seen.weight, per_channel=name == "weight")
            total += self._tie(loss, family) if name == "weight" else loss
        return _sum_over_ranks(total)

    def _distance(self, output: Tensor, target: Tensor, weight: Tensor | None, *, per_channel: bool) -> Tensor:
        """Return the distance, float64: (channels,) of the product where asked for, else (1,)."""
        axis = self.weight_axis
        if self.options.distance == "cosine":
            along = [d for d in range(output.dim()) if d != axis % output.dim()] if per_channel else [axis]
            dot = (output * target).sum(along)
            norms = output.square().sum(along) * target.square().sum(along)
            cosine = dot / norms.clamp(min=1e-20).sqrt()
            return (1 - cosine).double() if per_channel else (1 - cosine).sum(dtype=torch.float64).reshape(1)
        error = output.sub_(target)
        if self.options.distance == "l1":
            error = error.abs_()
        else:
            error = error.square_()
            if self.options.distance == "hessian":
                if weight is None:
                    raise CalibrationError("the Hessian-weighted distance needs output gradients, got none")
                error = error.mul_(weight)
        if not per_channel:
            return error.sum(dtype=torch.float64).reshape(1)
        return error.movedim(axis, -1).reshape(-1, error.shape[axis]).sum(0).double()

    def _tie(self, loss: Tensor, family: Candidates | None) -> Tensor:
        ties = getattr(family, "ties", None)
        if ties is None:
            return loss
        summed = torch.zeros(int(ties.max()) + 1, dtype=loss.dtype, device=loss.device)
        return summed.index_add(0, ties, loss)

    @staticmethod
    def _total(loss: Tensor) -> float:
        return float(loss.sum())

    def _quality(self) -> tuple[float, float]:
        """Return (SQNR in dB, share of clipped operand elements) over all ranks."""
        signal = noise = clipped = elements = 0.0
        weight = self._rounded_weight()
        for seen in self.all:
            rounded = self._rounded_inputs(seen, skip="")
            target = cast(Tensor, seen.target)
            noise += float((self._product(rounded, weight) - target).square().sum(dtype=torch.float64))
            signal += float(target.square().sum(dtype=torch.float64))
            for name, x, r in zip(self.module.operands, seen.inputs, rounded, strict=True):
                quantizer = self.module.operand_quantizers.get(name)
                if isinstance(quantizer, UniformQuantizer) and quantizer.scale is not None:
                    clipped += float(((x.float() - r).abs() > quantizer.scale * 0.5001).sum())
                    elements += x.numel()
        rows = gather((signal, noise, clipped, elements))
        signal, noise, clipped, elements = (sum(column) for column in zip(*rows, strict=True))
        sqnr = 10 * torch.log10(torch.tensor(max(signal, 1e-300) / max(noise, 1e-300), dtype=torch.float64))
        return float(sqnr), clipped / elements if elements else 0.0


def _segments(module: QWeighted) -> Tensor:
    """Return the group of each output channel: one for each projection that shares the product."""
    sizes = getattr(module, "segments", (module.weight.shape[0],))
    return torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).to(module.weight.device)


def _merge(seen: list[Observations]) -> list[Observations]:
    """Join observations whose units have the same shape."""
    groups: dict[tuple[torch.Size, ...], list[Observations]] = {}
    for o in seen:
        groups.setdefault(tuple(x.shape[1:] for x in o.inputs), []).append(o)
    return [_join(group) for group in groups.values()]


def _join(group: list[Observations]) -> Observations:
    if len(group) == 1:
        return group[0]
    columns = zip(*(o.inputs for o in group), strict=True)
    weights = [o.weight for o in group if o.weight is not None]
    targets = [o.target for o in group if o.target is not None]
    return Observations(
        tuple(torch.cat(column) for column in columns),
        torch.cat([o.keys for o in group]),
        torch.cat(weights) if weights else None,
        torch.cat(targets) if targets else None,
    )


def _sampled(seen: Observations, every: int) -> Observations:
    return seen.select(_hashed(seen.keys) % every == 0)


def _hashed(keys: Tensor) -> Tensor:
    """Mix the bits of int64 keys; neighbours become unrelated. Non-negative."""
    mixed = (keys * 0x9E3779B1) & 0x7FFFFFFF
    mixed = mixed ^ (mixed >> 15)
    return (mixed * 0x85EBCA6B >> 7) & 0x7FFFFFFF


def _sum_over_ranks(loss: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(loss)
    return loss


def summarise(results: Mapping[str, LayerResult], worst: int = 5) -> list[str]:
    """Name the layers with the lowest signal-to-noise ratio, worst first."""
    return sorted(results, key=lambda name: results[name].sqnr_db)[:worst]
