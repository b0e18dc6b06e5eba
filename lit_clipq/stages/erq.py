"""Weights are moved to where they undo the rounding of the input, then rounded by halves."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from lit_clipq.calibration.needs import Need, Write
from lit_clipq.errors import ConfigError
from lit_clipq.functional.columns import damped, round_halves
from lit_clipq.nn.modules import QWeighted
from lit_clipq.search.data import LayerData
from lit_clipq.search.gram import as_matrix, gram_of
from lit_clipq.stages.bias_correction import shift_bias
from lit_clipq.stages.stage import LayerTask, stage
from lit_clipq.stages.weights import ElementGrid, WeightStage, both_in_order, in_order, put_weight


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

    weighted: bool = True
    """Whether rows of the input weigh what an error of their output costs."""
    ridge: float = 0.1
    """l as a share of the mean diagonal of `X^^T X^`, in both regressions."""
    rounding: Literal["halves", "none"] = "halves"
    """Whether columns are rounded by halves; `none` leaves rounding to what follows, such as `gptq`."""

    def __post_init__(self) -> None:
        if not 0 < self.ridge < 1e6:
            raise ConfigError(f"ridge of stage erq must be above 0, got {self.ridge}")

    def asks(self) -> frozenset[Need]:
        """Ask for gradients only where they weigh rows."""
        return self.needs if self.weighted else frozenset({Need.OPERANDS})

    def improve(self, task: LayerTask, module: QWeighted, data: LayerData) -> Mapping[str, Any]:
        """Fit one layer; reports how far its weight moved, as a share of its norm."""
        gram = gram_of(module, data, "hessian" if self.weighted else "l2", residual=True, ones=True)
        assert gram.residual is not None  # noqa: S101 - it was asked for
        old = as_matrix(module, module.weight.detach().double())
        regular, _ = damped(gram.hessian, self.ridge)
        change = torch.linalg.solve(regular, gram.residual.mT).mT  # (G, R, d + 1)
        weight = old + change[..., :-1]
        moved = float(change[..., :-1].norm() / old.norm().clamp(min=1e-300))
        if self.rounding == "halves":
            hessian, _ = damped(gram.hessian[..., :-1, :-1], self.ridge)
            order = hessian.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)
            grid = ElementGrid.of(module)
            there = grid.permuted(order)
            halves = both_in_order(hessian, order)
            steps = round_halves(in_order(weight, order), halves, there.scale, there.low, there.high)
            put_weight(module, grid.values(in_order(steps, order.argsort(dim=-1))))
        else:
            put_weight(module, weight)
        shift_bias(task, module, change[..., -1].reshape(-1))
        return {"moved": moved}
