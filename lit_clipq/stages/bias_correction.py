"""The mean error of each output channel is taken off the bias."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lit_clipq.calibration.needs import Write
from lit_clipq.distributed import sum_over_ranks
from lit_clipq.nn.modules import QWeighted
from lit_clipq.nn.structure import add_bias
from lit_clipq.search.data import LayerData
from lit_clipq.search.losses import target_of
from lit_clipq.search.rounded import rounded_products
from lit_clipq.stages.stage import LayerTask, stage
from lit_clipq.stages.weights import WeightStage


@stage("bias_correction")
@dataclass(frozen=True)
class BiasCorrection(WeightStage):
    """Correct biases: `bias -= E[O^ - O]` for each output channel, over the units that matter.

    Kept where it is no worse on samples that are held out (`trial`). With `propagate: block` the mean is that behind
    quantized blocks, and takes off what they shift as well.
    """

    writes = frozenset({Write.BIAS})
    rounds = False

    def improve(self, task: LayerTask, module: QWeighted, data: LayerData) -> None:
        """Correct one layer."""
        shift_bias(task, module, -channel_errors(module, data)[0])


def shift_bias(task: LayerTask, module: QWeighted, by: Tensor) -> None:
    """Add `by` (channels,) to a layer's bias; one that has none gets one, which `task.structure` says."""
    if module.bias is None:
        task.structure.append(dict(add_bias(module, task.name)))
    assert module.bias is not None  # noqa: S101 - `add_bias` gave it one
    bias = module.bias.detach() + by.to(module.bias)
    module.bias = nn.Parameter(bias, requires_grad=module.bias.requires_grad)


def channel_errors(module: QWeighted, data: LayerData) -> tuple[Tensor, Tensor]:
    """Return E[O^ - O] and E[(O^ - O)^2] of each output channel, float32 and float64 (channels,), over all ranks.

    Args:
        module: A layer in its float phase whose grids have their scales.
        data: What it saw.
    """
    channels = len(module.weight)
    total = torch.zeros(3, channels, dtype=torch.float64, device=data.device)
    for units, _, output in rounded_products(module, data):
        difference = output.sub_(target_of(units))
        rows = difference.movedim(units.layout.channel_axis, -1).reshape(-1, channels)
        total[0] += rows.sum(0, dtype=torch.float64)
        total[1] += rows.square().sum(0, dtype=torch.float64)
        total[2] += len(rows)
    total = sum_over_ranks(total)
    count = total[2].clamp(min=1)
    return (total[0] / count).float(), total[1] / count
