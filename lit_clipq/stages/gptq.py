"""Weights are rounded column by column, and the error of each is made up for by those that follow."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_clipq.calibration.emulation import rounded_weight
from lit_clipq.calibration.needs import Need, Write
from lit_clipq.errors import ConfigError
from lit_clipq.functional.columns import asymmetric_push, damped, inverse_factor, round_columns
from lit_clipq.nn.modules import QWeighted
from lit_clipq.search.data import LayerData
from lit_clipq.search.gram import Gram, as_matrix, gram_of
from lit_clipq.stages.stage import LayerTask, stage
from lit_clipq.stages.weights import ElementGrid, WeightStage, both_in_order, falling, in_order, put_weight


@stage("gptq")
@dataclass(frozen=True)
class Gptq(WeightStage):
    """Round weights by GPTQ (arXiv 2210.17323) on the grids that they have, against the rounded input.

    Rows (output channels) that nearest rounding serves better keep that.
    """

    needs = frozenset({Need.OPERANDS, Need.GRADIENTS})
    writes = frozenset({Write.WEIGHTS})
    forbids = frozenset({"gptq", "gptaq"})
    matrices = 6

    weighted: bool = False
    """Whether rows of the input weigh what an error of their output costs, `H = X^T diag(g) X` (Gauss-Newton)."""
    damp: float = 0.01
    """Share of the mean diagonal of H that is added to the diagonal."""
    act_order: bool = True
    """Whether columns are rounded by falling diagonal of H, those first that see most; else in their own order."""

    def __post_init__(self) -> None:
        if not 0 < self.damp < 1e6:
            raise ConfigError(f"damp of stage {self.name} must be above 0, got {self.damp}")

    def improve(self, task: LayerTask, module: QWeighted, data: LayerData) -> Mapping[str, Any]:  # noqa: ARG002
        """Round one weight; reports how many rows nearest rounding serves better, and columns that no input reaches."""
        gram = self.gram(module, data)
        weight, grid = as_matrix(module, module.weight.detach().double()), ElementGrid.of(module)
        nearest = grid.nearest(as_matrix(module, rounded_weight(module).double()))  # ties as freezing breaks them
        steps, failed, dead = self.round(weight, grid, gram)
        steps = torch.where(failed[:, None, None], nearest, steps)
        worse = row_costs(weight, grid.values(steps), gram) > row_costs(weight, grid.values(nearest), gram)
        put_weight(module, grid.values(torch.where(worse[..., None], nearest, steps)))
        told = {"nearest_rows": int(worse.sum()), "dead_columns": int(dead.sum())}
        return {**told, "reason": "H has no Cholesky factor; nearest rounding"} if bool(failed.any()) else told

    def gram(self, module: QWeighted, data: LayerData) -> Gram:
        """Return the sums that it rounds by."""
        return gram_of(module, data, self.distance)

    def round(self, weight: Tensor, grid: ElementGrid, gram: Gram) -> tuple[Tensor, Tensor, Tensor]:
        """Return whole steps (G, R, d), which groups have no factor, (G,), and which columns are dead, (G, d)."""
        hessian, dead = damped(gram.hessian, self.damp)
        own = torch.arange(weight.shape[-1], device=weight.device).expand_as(dead)
        order = falling(gram.hessian) if self.act_order else own
        factor, good = inverse_factor(both_in_order(hessian, order))
        push = self.push(factor, gram, order)
        moved = grid.permuted(order)
        steps = round_columns(in_order(weight, order), factor, moved.scale, moved.low, moved.high, push)
        return in_order(steps, order.argsort(dim=-1)), ~good, dead

    def push(self, factor: Tensor, gram: Gram, order: Tensor) -> Tensor | None:  # noqa: ARG002
        """Return what columns pass on beside their error."""
        return None


@stage("gptaq")
@dataclass(frozen=True)
class Gptaq(Gptq):
    """GPTQ that makes up for the rounding of the input as well (GPTAQ, arXiv 2504.02692)."""

    matrices = 9

    strength: float = 0.25
    """Share of what the input's rounding asks for that is passed on, 0 to 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.strength <= 1:
            raise ConfigError(f"strength of stage gptaq must be at least 0 and at most 1, got {self.strength}")

    def gram(self, module: QWeighted, data: LayerData) -> Gram:
        """Return the sums that it rounds by."""
        return gram_of(module, data, self.distance, deviation=True)

    def push(self, factor: Tensor, gram: Gram, order: Tensor) -> Tensor | None:
        """Return what columns pass on beside their error."""
        assert gram.deviation is not None  # noqa: S101 - `gram` asked for it
        return asymmetric_push(factor, both_in_order(gram.deviation, order), self.strength)


def row_costs(weight: Tensor, rounded: Tensor, gram: Gram) -> Tensor:
    """Return what rounding a weight costs each row, (G, R) float64, but for a constant of the row.

    With C = W - Q that is `C H C^T`, and `+ 2 W D C^T` where the input's rounding counts: the square of
    `X W^T - X^ Q^T`.
    """
    change = weight - rounded.double()
    cost = ((change @ gram.hessian) * change).sum(-1)
    return cost if gram.deviation is None else cost + 2 * ((weight @ gram.deviation) * change).sum(-1)
