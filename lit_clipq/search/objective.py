"""The objective of one layer as its grids and parameters stand, whoever gave them to it."""

import torch

from lit_clipq.distributed import sum_over_ranks
from lit_clipq.functional.distance import Distance, distance_from_sums, distance_sums, sums_of
from lit_clipq.nn.modules import QModule, QWeighted
from lit_clipq.search.data import LayerData
from lit_clipq.search.losses import ProductLosses, output_elements, parts, target_of, workspace


@torch.no_grad()
def layer_objective(module: QModule, data: LayerData, distance: Distance, *, factored: bool = True) -> float:
    """Return the distance between a layer's product with rounded operands and what it should be, over all ranks.

    Args:
        module: The layer in its float phase; each of its grids has its scale.
        data: What the layer saw.
        distance: What is added up.
        factored: Whether squared gradients are factored over rows and channels; see `SearchOptions`.
    """
    seen, unit = data.weighted(distance, factor=factored)
    losses = ProductLosses(module, {}, distance, data.device)
    weight = None
    if isinstance(module, QWeighted):
        weight = module.weight.detach().float()
        weight = weight if module.weight_quantizer is None else module.weight_quantizer(weight)
    total = torch.zeros(sums_of(distance, per_channel=False), 1, dtype=torch.float64, device=data.device)
    for o in seen:
        for _, units in parts(o, output_elements(o), workspace(data.device)) if len(o.keys) else ():
            quantizers = (module.operand_quantizers.get(name) for name in module.operands)
            inputs = [x if q is None else q(x) for q, x in zip(quantizers, units.inputs, strict=True)]
            output = inputs[0] @ inputs[1] if weight is None else losses.product(inputs[0], o.layout, weight)
            axis = o.layout.channel_axis
            total += distance_sums(output, target_of(units), units.weight, distance, axis=axis, per_channel=False)
    return distance_from_sums(sum_over_ranks(total), distance).item() * unit
