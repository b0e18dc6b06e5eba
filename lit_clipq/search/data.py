"""What one layer saw, ready to be compared on: ranges, influence, targets and weights of errors.

Computed once for a layer and shared by the searches of all widths; nothing here is written to.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lit_clipq.calibration.observations import Observations, with_influence
from lit_clipq.distributed import gather
from lit_clipq.errors import CalibrationError
from lit_clipq.functional.distance import Distance
from lit_clipq.nn.modules import QModule, QWeighted
from lit_clipq.search.losses import ProductLosses
from lit_clipq.search.sampling import factored


class LayerData:
    """Observations of one layer over this rank, and what follows from them over all ranks.

    Units whose output gradients are all zero count for the ranges and for nothing else.

    Args:
        name: How errors call the layer.
        module: The layer with its float weight and bias.
        seen: Joined observations of this rank, of which there may be none.
        device: Where the ranks exchange.
    """

    @torch.no_grad()
    def __init__(self, name: str, module: QModule, seen: Sequence[Observations], device: torch.device) -> None:
        self.name, self.module, self.device = name, module, device
        self._own = [
            [o.range_of(i).cpu() for o in seen if len(o.keys) or o.extremes is not None]
            for i in range(len(module.operands))
        ]
        self._ranges: dict[int, tuple[Tensor, Tensor]] = {}
        self.seen = with_influence(seen)
        self._weighted: dict[tuple[bool, bool], tuple[list[Observations], float]] = {}

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
        takes_weights = distance == "hessian"
        key = takes_weights, factor and takes_weights and isinstance(self.module, QWeighted)
        if key not in self._weighted:
            self._weighted[key] = self._weigh(takes_weights, factor=key[1])
        return self._weighted[key]

    def _weigh(self, takes_weights: bool, *, factor: bool) -> tuple[list[Observations], float]:
        data, unit = list(self.seen), 1.0
        if takes_weights:
            if any(o.weight is None for o in data):
                raise CalibrationError(f"the Hessian-weighted distance of {self.name} needs output gradients, got none")
            if factor:
                data = factored(data, len(self.module.get_parameter("weight")), self.device)
            unit = _unit(data)
        losses = ProductLosses(self.module, {}, "l2", self.device)
        return [_ready(o, losses, unit, takes_weights) for o in data], unit


def _ready(o: Observations, losses: ProductLosses, unit: float, takes_weights: bool) -> Observations:
    weight = o.weight.float() / unit if takes_weights and o.weight is not None else None
    o = replace(o, inputs=tuple(x.float() for x in o.inputs), weight=weight)
    return o if o.target is not None else replace(o, target=losses.targets(o))


def _unit(data: Sequence[Observations]) -> float:
    """Return the power of two below the largest weight of an error, over all ranks."""
    largest = [float(o.weight.max()) for o in data if o.weight is not None and len(o.keys)]
    top = max((x for rank in gather(largest) for x in rank), default=0.0)
    return 2.0 ** math.floor(math.log2(top)) if top > 0 else 1.0
