"""A factor and a shift for each output channel make good what rounding took, folded into scale and bias."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_clipq.calibration.emulation import rounded_weight
from lit_clipq.calibration.needs import Need, Write
from lit_clipq.distributed import sum_over_ranks
from lit_clipq.errors import ConfigError
from lit_clipq.functional.granularity import PerChannel, PerGroup
from lit_clipq.nn.modules import QWeighted
from lit_clipq.nn.quantizer import UniformQuantizer
from lit_clipq.search.data import LayerData
from lit_clipq.search.losses import target_of
from lit_clipq.search.rounded import rounded_products
from lit_clipq.stages.bias_correction import shift_bias
from lit_clipq.stages.stage import LayerTask, stage
from lit_clipq.stages.weights import WeightStage, put_weight


@stage("affine")
@dataclass(frozen=True)
class Affine(WeightStage):
    """Fit `O ~ gamma O^ + beta` for each output channel (QwT-v2, arXiv 2505.20932).

    gamma goes into the scale of the weight's grid, beta into the bias: the codes stay, and nothing is computed beside
    what is. Where the channels of a weight share a scale, or its grid is not uniform, only the bias is fitted.
    """

    needs = frozenset({Need.OPERANDS, Need.GRADIENTS})
    writes = frozenset({Write.SCALES, Write.WEIGHTS, Write.BIAS})
    rounds = False

    weighted: bool = False
    """Whether units weigh what an error of theirs costs."""
    largest: float = 2.0
    """Largest gamma; its inverse is the smallest."""

    def __post_init__(self) -> None:
        if not 1 <= self.largest < math.inf:
            raise ConfigError(f"largest of stage affine must be at least 1, got {self.largest}")

    def improve(self, task: LayerTask, module: QWeighted, data: LayerData) -> Mapping[str, Any]:
        """Fit one layer; reports the smallest and the largest gamma."""
        grid = module.weight_quantizer
        own = grid is None or (
            isinstance(grid, UniformQuantizer)
            and (isinstance(grid.granularity, PerGroup) or grid.granularity == PerChannel(0))
        )
        largest = self.largest if own else 1.0
        gamma, bias = self.fitted(module, data, largest)
        if own:
            factor = gamma.view(-1, *[1] * (module.weight.dim() - 1))
            put_weight(module, rounded_weight(module).detach() * factor)
            if isinstance(grid, UniformQuantizer):
                scale = grid._need("scale")
                grid.load_parameters(scale * gamma.view(-1, *[1] * (scale.dim() - 1)), grid._need("zero_point"))
        old = 0 if module.bias is None else module.bias.detach()
        shift_bias(task, module, bias - old)
        return {"gamma": [float(gamma.min()), float(gamma.max())]}

    def fitted(self, module: QWeighted, data: LayerData, largest: float) -> tuple[Tensor, Tensor]:
        """Return gamma and the new bias of each output channel, float32 (channels,): weighted regression.

        A channel whose product is constant, or that no unit weighs, has gamma 1, and the bias that fits best.
        """
        channels = len(module.weight)
        sums = torch.zeros(5, channels, dtype=torch.float64, device=data.device)
        old = sums[0].clone() if module.bias is None else module.bias.detach().double()
        for units, _, output in rounded_products(module, data, self.distance):
            tensors = (output, target_of(units), units.weight)
            found, wanted, weight = (None if x is None else _rows(x, units.layout.channel_axis) for x in tensors)
            found, wanted = found - old, wanted - old  # type: ignore[operator]
            w = torch.ones_like(found) if weight is None else weight
            sums += torch.stack([w, w * found, w * wanted, w * found.square(), w * found * wanted]).sum(1)
        total, found, wanted, squares, both = sum_over_ranks(sums)
        seen = total > 0
        total = total.clamp(min=1e-300)
        variance = squares / total - (found / total).square()
        covariance = both / total - (found / total) * (wanted / total)
        sure = variance > 1e-9 * (squares / total)
        gamma = torch.where(sure, covariance / variance.clamp(min=1e-300), 1.0)
        gamma = torch.where(gamma > 0, gamma, 1.0).clamp(1 / largest, largest).float()
        bias = old + torch.where(seen, (wanted - gamma.double() * found) / total, 0.0)
        return gamma, bias.float()


def _rows(x: Tensor, axis: int) -> Tensor:
    """Return a cut product as float64 rows (N, channels)."""
    return x.movedim(axis, -1).reshape(-1, x.shape[axis]).double()
