"""What quantizing single operands of a layer costs, on the observations that its grids were found on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lit_clipq.calibration.needs import Need, Write
from lit_clipq.distributed import sum_over_ranks
from lit_clipq.nn.modules import QWeighted
from lit_clipq.search.layer import SearchOptions
from lit_clipq.search.losses import ProductLosses, output_elements, parts, target_of, workspace
from lit_clipq.stages.stage import LayerStage, LayerTask, stage

ALL = "all"
"""Every operand of a layer together."""


@stage("sensitivity")
@dataclass(frozen=True)
class Sensitivity(LayerStage):
    """Report, for each operand of a layer alone and for all together, the error of its product; changes nothing.

    `sqnr_db` is that of the product itself. `weighted` is `sum w e^2` over the calibration set, w the squared gradients
    of the objective: under Gauss-Newton an estimate of the squared error that it makes in the outputs that matter, each
    divided by its number of elements, to first order and with errors of different elements taken as unrelated.
    """

    needs = frozenset({Need.OPERANDS, Need.GRADIENTS})
    reads: ClassVar[frozenset[Write]] = frozenset({Write.SCALES})

    @torch.no_grad()
    def fit(self, task: LayerTask) -> Any:
        """Return `{operand: {sqnr_db, weighted}}` of one layer; `sqnr_db` is absent where there is no error."""
        searched = next((s for s in task.draft.stages if isinstance(s, SearchOptions)), None)
        data, unit = task.data.weighted("hessian", factor=searched.factored if searched is not None else True)
        module = task.module
        losses = ProductLosses(module, {}, "l2", task.data.device)
        quantizers = dict(module.operand_quantizers)
        names = [*(["weight"] if isinstance(module, QWeighted) and module.weight_quantizer else []), *quantizers]
        chosen = {**({ALL: tuple(names)} if len(names) > 1 else {}), **{name: (name,) for name in names}}
        sums = torch.zeros(len(chosen), 3, dtype=torch.float64, device=task.data.device)
        weights = {name: _weight(module, operands) for name, operands in chosen.items()}
        for o in data:
            for _, units in parts(o, output_elements(o), workspace(task.data.device)) if len(o.keys) else ():
                target = target_of(units)
                pairs = list(zip(module.operands, units.inputs, strict=True))
                rounded = [quantizers[n](x) if n in quantizers else x for n, x in pairs]
                for row, (name, operands) in enumerate(chosen.items()):
                    inputs = [r if n in operands else x for (n, x), r in zip(pairs, rounded, strict=True)]
                    product = _product(losses, inputs, o.layout, weights[name])
                    error = (product - target).square_()
                    sums[row, 0] += target.square().sum(dtype=torch.float64)
                    sums[row, 1] += error.sum(dtype=torch.float64)
                    if units.weight is not None:
                        sums[row, 2] += error.mul_(units.weight).sum(dtype=torch.float64)
        rows = sum_over_ranks(sums).tolist()
        return {name: _told(row[0], row[1], row[2] * unit) for name, row in zip(chosen, rows, strict=True)}


def _weight(module: Any, operands: Sequence[str]) -> Tensor | None:
    """Return the weight of a layer, rounded if it is among the operands; `None` if there is none."""
    if not isinstance(module, QWeighted):
        return None
    weight = module.weight.detach().float()
    quantizer = module.weight_quantizer
    return quantizer(weight) if quantizer is not None and "weight" in operands else weight


def _product(losses: ProductLosses, inputs: Sequence[Tensor], layout: Any, weight: Tensor | None) -> Tensor:
    return inputs[0] @ inputs[1] if weight is None else losses.product(inputs[0], layout, weight)


def _told(signal: float, error: float, weighted: float) -> dict[str, float]:
    told = {"weighted": weighted}
    return {"sqnr_db": 10 * math.log10(signal / error), **told} if signal > 0 and error > 0 else told
