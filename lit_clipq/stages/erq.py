"""Weights are moved to where they undo the rounding of the input, then rounded by halves."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lit_clipq.calibration.needs import Need, Write
from lit_clipq.errors import ConfigError
from lit_clipq.functional.columns import LEAST_RIDGE, damped, inverse_factor, round_columns, round_halves
from lit_clipq.nn.modules import QWeighted
from lit_clipq.search.data import LayerData
from lit_clipq.search.gram import as_matrix, gram_of
from lit_clipq.stages.bias_correction import shift_bias
from lit_clipq.stages.stage import LayerTask, stage
from lit_clipq.stages.weights import ElementGrid, WeightStage, both_in_order, falling, in_order, put_weight


@stage("erq")
@dataclass(frozen=True)
class Erq(WeightStage):
    """Two ridge regressions (ERQ, arXiv 2407.06794): weight and bias for the rounded input, then rounding by halves.

    First `[W b] += ((X^^T X^ + l I)^-1 X^^T (Y - Y^))^T`, X^ the rounded input with a column of ones. Then half of the
    columns that are left are rounded at a time, and the rest moves by the least squares answer to their error.
    """

    needs = frozenset({Need.OPERANDS, Need.GRADIENTS})
    writes = frozenset({Write.WEIGHTS, Write.BIAS})
    forbids = frozenset({"gptq", "gptaq"})
    matrices = 6

    weighted: bool = False
    """Whether rows of the input weigh what an error of their output costs."""
    ridge: float = 0.1
    """l as a share of the mean diagonal of `X^^T X^`, in both regressions."""
    rounding: Literal["halves", "columns", "none"] = "halves"
    """Whether columns are rounded by halves, or one after the other as `gptq` does; `none` leaves them unrounded."""
    damp: float = 0.01
    """What `gptq` calls by that name, for columns one after the other."""

    def __post_init__(self) -> None:
        if not LEAST_RIDGE <= self.ridge < 1e6:
            raise ConfigError(f"ridge of stage erq must be above 0, at least {LEAST_RIDGE:g}, got {self.ridge}")
        if not 0 < self.damp < 1e6:
            raise ConfigError(f"damp of stage erq must be above 0, got {self.damp}")

    def improve(self, task: LayerTask, module: QWeighted, data: LayerData) -> Mapping[str, Any]:
        """Fit one layer; reports how far its weight moved before it was rounded, as a share of its norm."""
        gram = gram_of(module, data, self.distance, residual=True, ones=True)
        assert gram.residual is not None  # noqa: S101 - it was asked for
        old = as_matrix(module, module.weight.detach().double())
        regular, _ = damped(gram.hessian, self.ridge)
        change = torch.linalg.solve(regular, gram.residual.mT).mT  # (G, R, d + 1)
        weight = old + change[..., :-1]
        put_weight(module, weight if self.rounding == "none" else self.rounded(module, weight, gram.hessian))
        shift_bias(task, module, change[..., -1].reshape(-1))
        return {"moved": float(change[..., :-1].norm() / old.norm().clamp(min=1e-300))}

    def rounded(self, module: QWeighted, weight: Tensor, hessian: Tensor) -> Tensor:
        """Return a moved weight (G, R, d) rounded, float32; H has a column of ones behind the others."""
        plain, grid = hessian[..., :-1, :-1], ElementGrid.of(module)
        order = falling(plain)
        regular, _ = damped(plain, self.ridge if self.rounding == "halves" else self.damp)
        regular, there, moved = both_in_order(regular, order), grid.permuted(order), in_order(weight, order)
        if self.rounding == "halves":
            steps = round_halves(moved, regular, there.scale, there.low, there.high)
        else:
            factor, _ = inverse_factor(regular)  # the identity where there is none: nearest rounding
            steps = round_columns(moved, factor, there.scale, there.low, there.high)
        return grid.values(in_order(steps, order.argsort(dim=-1)))
