"""What a layer computes of what it saw when every operand with a grid is rounded, as freezing it would leave it."""

from collections.abc import Iterator

import torch
from torch import Tensor

from lit_clipq.calibration.emulation import rounded_weight
from lit_clipq.calibration.observations import Observations
from lit_clipq.distributed import sum_over_ranks
from lit_clipq.functional.distance import Distance
from lit_clipq.nn.modules import QModule, QWeighted
from lit_clipq.search.data import LayerData
from lit_clipq.search.losses import ProductLosses, output_elements, parts, target_of, workspace


@torch.no_grad()
def rounded_products(
    module: QModule, data: LayerData, distance: Distance = "l2", *, factor: bool = True
) -> Iterator[tuple[Observations, tuple[Tensor, ...], Tensor]]:
    """Yield runs of units of this rank, their rounded operands, and the product of those, bias included.

    Args:
        module: In its float phase, its grids with their scales.
        data: What it saw.
        distance: With `hessian` the units have the weights of their errors.
        factor: Whether these are factored over rows and channels.
    """
    losses = ProductLosses(module, {}, "l2", data.device)
    weight = rounded_weight(module).detach().float() if isinstance(module, QWeighted) else None
    quantizers = [module.operand_quantizers.get(name) for name in module.operands]
    for o in data.weighted(distance, factor=factor)[0]:
        for _, units in parts(o, output_elements(o), workspace(data.device)) if len(o.keys) else ():
            inputs = tuple(x if q is None else q(x) for q, x in zip(quantizers, units.inputs, strict=True))
            output = inputs[0] @ inputs[1] if weight is None else losses.product(inputs[0], o.layout, weight)
            yield units, inputs, output


@torch.no_grad()
def rounded_error(module: QModule, data: LayerData, distance: Distance, *, factor: bool = True) -> tuple[float, int]:
    """Return `sum w (O^ - O)^2` over the units of all ranks, and how many units there are.

    Args:
        module: In its float phase, its grids with their scales.
        data: What it saw.
        distance: `hessian` weighs errors by squared gradients, `l2` does not.
        factor: Whether squared gradients are factored over rows and channels.
    """
    total = torch.zeros(2, dtype=torch.float64, device=data.device)
    for units, _, output in rounded_products(module, data, distance, factor=factor):
        error = output.sub_(target_of(units)).square_()
        total[0] += (error if units.weight is None else error.mul_(units.weight)).sum(dtype=torch.float64)
        total[1] += len(units.keys)
    error, count = sum_over_ranks(total).tolist()
    return error * data.weighted(distance, factor=factor)[1], int(count)
