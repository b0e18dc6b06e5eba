"""The mean error of each output channel is taken off the bias."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_clipq.calibration.needs import Need, Write
from lit_clipq.distributed import sum_over_ranks
from lit_clipq.nn.modules import QWeighted
from lit_clipq.nn.structure import add_bias
from lit_clipq.search.data import LayerData
from lit_clipq.search.losses import ProductLosses, output_elements, parts, target_of, workspace
from lit_clipq.stages.stage import LayerStage, LayerTask, finite, stage


@stage("bias_correction")
@dataclass(frozen=True)
class BiasCorrection(LayerStage):
    """Correct biases: `bias -= E[O^ - O]` for each output channel, over the units that matter."""

    needs = frozenset({Need.OPERANDS})
    reads = frozenset({Write.SCALES})
    writes = frozenset({Write.BIAS})

    @torch.no_grad()
    def fit(self, task: LayerTask) -> Any:
        """Correct one layer; reports its mean squared error before and after."""
        module = task.module
        if not isinstance(module, QWeighted):
            return None
        mean, squares = channel_errors(module, task.data)
        error = mean.to(module.weight)
        if module.bias is None:
            task.structure.append(dict(add_bias(module, task.name)))
        assert module.bias is not None  # noqa: S101 - `add_bias` gave it one
        module.bias = nn.Parameter(module.bias.detach() - error, requires_grad=module.bias.requires_grad)
        before = float(squares.mean())
        return {"before": finite(before), "after": finite(before - float(mean.double().square().mean()))}


def channel_errors(module: QWeighted, data: LayerData) -> tuple[Tensor, Tensor]:
    """Return E[O^ - O] and E[(O^ - O)^2] of each output channel, float32 and float64 (channels,), over all ranks.

    Args:
        module: A layer in its float phase whose grids have their scales.
        data: What it saw.
    """
    weight = module.weight.detach().float()
    rounded = weight if module.weight_quantizer is None else module.weight_quantizer(weight)
    quantizer = module.operand_quantizers.get("input")
    losses = ProductLosses(module, {}, "l2", data.device)
    total = torch.zeros(3, len(weight), dtype=torch.float64, device=data.device)
    for o in data.weighted("l2")[0]:
        for _, units in parts(o, output_elements(o), workspace(data.device)) if len(o.keys) else ():
            x = units.inputs[0] if quantizer is None else quantizer(units.inputs[0])
            difference = losses.product(x, o.layout, rounded).sub_(target_of(units))
            rows = difference.movedim(o.layout.channel_axis, -1).reshape(-1, len(weight))
            total[0] += rows.sum(0, dtype=torch.float64)
            total[1] += rows.square().sum(0, dtype=torch.float64)
            total[2] += len(rows)
    total = sum_over_ranks(total)
    count = total[2].clamp(min=1)
    return (total[0] / count).float(), total[1] / count
