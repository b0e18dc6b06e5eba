"""Hessian-guided search of every scale (after PTQ4ViT, arXiv 2111.12293)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_clipq.calibration.needs import Need, Write
from lit_clipq.errors import ConfigError
from lit_clipq.functional.granularity import extrema
from lit_clipq.nn.modules import QWeighted
from lit_clipq.nn.swap import Layer, QuantizationMap
from lit_clipq.search.layer import LayerSearch, SearchOptions
from lit_clipq.search.selection import coarse_to_fine
from lit_clipq.stages.stage import LayerStage, LayerTask, stage


@stage("search")
@dataclass(frozen=True)
class Search(SearchOptions, LayerStage):
    """Take the scales that minimise the distance between each product and its quantized form.

    By default that is `sum g^2 (O^ - O)^2` with g the gradient of the objective by the product.
    """

    needs = frozenset({Need.OPERANDS, Need.GRADIENTS})
    writes = frozenset({Write.SCALES})
    forbids = frozenset({"ranges"})
    tables = True

    def asks(self) -> frozenset[Need]:
        """Ask for gradients only where they weigh errors."""
        return self.needs if self.distance == "hessian" else frozenset({Need.OPERANDS})

    def check(self, plan: QuantizationMap, layers: Sequence[Layer]) -> None:
        """Refuse weights that are not float32."""
        planned = {entry.name for entry in plan.quantized}
        for layer in layers:
            weight = layer.module._parameters.get("weight")
            if layer.name in planned and weight is not None and weight.dtype != torch.float32:
                raise ConfigError(
                    f"the search needs float32, but {layer.name} is in {str(weight.dtype).removeprefix('torch.')}; "
                    "calibrate the model in fp32"
                )

    def fit(self, task: LayerTask) -> Any:
        """Search the grids of one layer; of a table those of its rows, by the squared error of each row itself."""
        if task.layer.kind.is_table:
            self._search_table(task)
            return None
        task.result = LayerSearch(task.data, self, task.module).run()
        return None

    @torch.no_grad()
    def _search_table(self, task: LayerTask) -> None:
        table = task.module
        if not isinstance(table, QWeighted) or table.weight_quantizer is None:
            return
        weight, quantizer = table.weight.detach(), table.weight_quantizer
        family = self.grid.of(quantizer, *extrema(weight, quantizer.granularity), device=weight.device)

        def error(index: Tensor) -> Tensor:
            return (family.apply(weight, index[None])[0] - weight).square_().sum(dim=1)

        family.commit(coarse_to_fine(error, family.count, family.start))
