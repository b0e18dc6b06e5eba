"""What one layer saw, ready to be compared on: ranges, influence, targets and weights of errors.

Computed once for a layer and shared by the searches of all widths; nothing here is written to.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from lit_clipq.calibration.batches import sample_of
from lit_clipq.calibration.observations import Observations, with_influence
from lit_clipq.distributed import gather
from lit_clipq.errors import CalibrationError
from lit_clipq.functional.distance import Distance
from lit_clipq.functional.granularity import PerChannel, extrema
from lit_clipq.nn.modules import QModule, QWeighted
from lit_clipq.search.losses import ProductLosses
from lit_clipq.search.sampling import factored

_HELD_OUT = 4  # every so many samples one is held out


def held_out(samples: Tensor) -> Tensor:
    """Tell which samples, by their global numbers int64 (N,), are not fitted to but judged on: every fourth."""
    return samples % _HELD_OUT == 1


class LayerData:
    """Observations of one layer over this rank, and what follows from them over all ranks.

    Units whose output gradients are all zero count for the ranges and for nothing else.

    Args:
        name: How errors call the layer.
        module: The layer with its float weight and bias.
        seen: Joined observations of this rank, of which there may be none.
        device: Where the ranks exchange.
        once: Whether weights of errors are asked for in one form only, so that the gradients they are made of need not
            be kept.
    """

    @torch.no_grad()
    def __init__(
        self, name: str, module: QModule, seen: Sequence[Observations], device: torch.device, *, once: bool = False
    ) -> None:
        self.name, self.module, self.device = name, module, device
        self._own = [
            [o.range_of(i).cpu() for o in seen if len(o.keys) or o.extremes is not None]
            for i in range(len(module.operands))
        ]
        self._ranges: dict[int, tuple[Tensor, Tensor]] = {}
        self.seen = with_influence(seen)
        self.once = once
        self._ready: list[Observations] | None = None
        self._weighted: dict[bool, tuple[list[Observations], float]] = {}
        self._parts: dict[Distance, tuple[LayerData, LayerData]] = {}

    def range_of(self, operand: int) -> tuple[Tensor, Tensor]:
        """Return minimum and maximum of an operand over all ranks, on the CPU; a collective call the first time.

        Raises:
            CalibrationError: If no rank observed anything, or values are not finite.
        """
        if operand not in self._ranges:
            pieces = [piece for rank in gather(self._own[operand]) for piece in rank]
            if not pieces:
                raise CalibrationError(
                    f"layer {self.name} saw 0 calibration batches; give batches that reach it (pictures for the image "
                    "tower, texts for the text tower) or exclude it"
                )
            low, high = torch.stack(pieces).unbind(1)
            if not bool((low.isfinite() & high.isfinite()).all()):
                raise CalibrationError(
                    f"layer {self.name} received NaN or Inf in calibration; check the calibration samples and the "
                    "weights in front of it"
                )
            self._ranges[operand] = low.min(), high.max()
        return self._ranges[operand]

    @torch.no_grad()
    def channel_range_of(self, operand: int, axis: int) -> tuple[Tensor, Tensor]:
        """Return minima and maxima along an axis of an operand, over the units with influence of all ranks, on the CPU.

        A collective call.
        """
        own = [
            torch.stack(extrema(o.inputs[operand].float(), PerChannel(axis))).cpu() for o in self.seen if len(o.keys)
        ]
        low, high = torch.stack([piece for rank in gather(own) for piece in rank]).unbind(1)
        return low.amin(0), high.amax(0)

    @torch.no_grad()
    def weighted(self, distance: Distance, *, factor: bool = True) -> tuple[list[Observations], float]:
        """Return observations in float32 with targets, and with weights of errors where the distance takes them.

        Args:
            distance: Only `hessian` takes weights.
            factor: Whether the weights of a layer with a weight are factored over rows and channels.

        Returns:
            The data, and the unit that their weights were divided by: a power of two below the largest. So weighted
            errors stay clear of subnormal numbers, on which processors are ten times slower.

        Raises:
            CalibrationError: If gradients are missing.
        """
        if distance != "hessian":
            return [replace(o, weight=None) for o in self._with_targets()], 1.0
        key = factor and isinstance(self.module, QWeighted)
        if key not in self._weighted:
            if any(o.weight is None for o in self.seen):
                raise CalibrationError(f"the Hessian-weighted distance of {self.name} needs output gradients, got none")
            self._weighted[key] = self._weigh(factor=key)
        return self._weighted[key]

    @torch.no_grad()
    def split(self, distance: Distance) -> "tuple[LayerData, LayerData]":
        """Return what to fit on and what to judge on: the units of three of four samples, and those of the fourth.

        Which samples those are goes by their global numbers, so that any number of ranks holds out the same. Both parts
        have the ranges of the whole. Errors are weighed as they were before, where a search has done that.

        Args:
            distance: For which distance `weighted` will be asked.
        """
        if distance not in self._parts:
            factor = not self._weighted or True in self._weighted
            data, unit = self.weighted(distance, factor=factor)
            fitted, judged = LayerData.__new__(LayerData), LayerData.__new__(LayerData)
            for part, held in ((fitted, False), (judged, True)):
                part.__dict__.update(self.__dict__)
                chosen = [o.select(held_out(sample_of(o.keys)) == held) for o in data]
                part.seen = part._ready = [replace(o, weight=None) for o in chosen]
                part._weighted = dict.fromkeys((True, False), (chosen, unit)) if distance == "hessian" else {}
                part._parts = {}
            self._parts[distance] = fitted, judged
        return self._parts[distance]

    def _with_targets(self) -> list[Observations]:
        """Return the observations with operands in float32 and targets, which everything shares."""
        if self._ready is None:
            losses = ProductLosses(self.module, {}, "l2", self.device)
            self.seen = [replace(o, inputs=tuple(x.float() for x in o.inputs)) for o in self.seen]
            self._ready = [o if o.target is not None else replace(o, target=losses.targets(o)) for o in self.seen]
        return self._ready

    def _weigh(self, *, factor: bool) -> tuple[list[Observations], float]:
        data = list(self.seen)
        if factor:
            data = factored(data, len(self.module.get_parameter("weight")), self.device)
        unit = _unit(data)
        weights = [cast(Tensor, o.weight).float() for o in data]
        # those that were factored are nobody else's yet
        weights = [w.div_(unit) if factor else w / unit for w in weights]
        if self.once:
            self.seen, self._ready = ([replace(o, weight=None) for o in x] for x in (self.seen, self._with_targets()))
        return [replace(o, weight=w) for o, w in zip(self._with_targets(), weights, strict=True)], unit


def _unit(data: Sequence[Observations]) -> float:
    """Return the power of two below the largest weight of an error, over all ranks."""
    largest = [float(o.weight.max()) for o in data if o.weight is not None and len(o.keys)]
    top = max((x for rank in gather(largest) for x in rank), default=0.0)
    return 2.0 ** math.floor(math.log2(top)) if top > 0 else 1.0
