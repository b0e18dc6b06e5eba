"""A linear layer beside each block adds back what quantizing the block took."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_clipq.calibration.needs import Write
from lit_clipq.distributed import sum_over_ranks
from lit_clipq.errors import ConfigError
from lit_clipq.functional.columns import LEAST_RIDGE, damped
from lit_clipq.nn.structure import COMPENSATION
from lit_clipq.nn.swap import FLOAT_BITS, MapEntry, QuantizationMap
from lit_clipq.search.data import held_out
from lit_clipq.stages.blocks import BlockFit, BlockRows, BlockStage
from lit_clipq.stages.draft import Draft
from lit_clipq.stages.stage import finite, stage


@stage("qwt")
@dataclass(frozen=True)
class Qwt(BlockStage):
    """Let each block return `y^ + W x + b`, W and b fitted to `y - y^` by ridge regression (QwT, arXiv 2411.13918).

    x is what the block gets behind the quantized and compensated blocks in front of it, y what its float form makes of
    it. Kept where the squared error is no larger on samples held out. The layer is float, and the map lists its cost.
    """

    reads = frozenset({Write.SCALES})
    writes = frozenset({Write.STRUCTURE})

    ridge: float = 0.01
    """Share of the mean diagonal of `X^T X` that is added to the diagonal."""

    def __post_init__(self) -> None:
        if not LEAST_RIDGE <= self.ridge < 1e6:
            raise ConfigError(f"ridge of stage qwt must be above 0, at least {LEAST_RIDGE:g}, got {self.ridge}")

    def begin(self, draft: Draft, name: str, width: int) -> "Compensating":
        """Begin with a block."""
        return Compensating(draft, name, width, self.ridge)


class Compensating(BlockFit):
    """The regression of one block; sums of what is fitted on and of what is held out.

    Args:
        draft: What it belongs to.
        name: The block.
        width: d, its channels.
        ridge: Share of the mean diagonal.
    """

    def __init__(self, draft: Draft, name: str, width: int, ridge: float) -> None:
        self.draft, self.name, self.width, self.ridge = draft, name, width, ridge
        zeros = torch.zeros(2, width + 1, 2 * width + 2, dtype=torch.float64, device=draft.session.device)
        self.sums = zeros  # of each part: H with a column of ones, X^T (y - y^), then squares and number of rows

    def add(self, rows: BlockRows) -> None:
        """Add the rows of a batch."""
        x = torch.cat([rows.inputs, torch.ones_like(rows.inputs[:, :1])], dim=1).double()
        missing = rows.wanted.double() - rows.found.double()
        held = held_out(rows.samples)
        d = self.width
        for part, chosen in enumerate((~held, held)):
            a, r = x[chosen], missing[chosen]
            self.sums[part, :, : d + 1] += a.T @ a
            self.sums[part, :, d + 1 : -1] += a.T @ r
            self.sums[part, 0, -1] += r.square().sum()

    def finish(self, rows_per_sample: float) -> Mapping[str, Any]:
        """Fit, and keep the layer where it is no worse; reports squared errors on what was held out."""
        d = self.width
        fitted, judged = sum_over_ranks(self.sums)
        hessian, _ = damped(fitted[None, :, : d + 1], self.ridge)
        solution = torch.linalg.solve(hessian[0], fitted[:, d + 1 : -1])  # (d + 1, d)
        before, units = float(judged[0, -1]), float(judged[d, d])
        explained = (solution * (2 * judged[:, d + 1 : -1] - judged[:, : d + 1] @ solution)).sum()
        after = before - float(explained)
        kept = units > 0 and after <= before
        if kept:
            self._attach(solution.float(), rows_per_sample)
        told = {"before": finite(before), "after": finite(after), "kept": kept}
        return told if units else {**told, "reason": "no sample to be judged on"}

    def _attach(self, solution: Tensor, rows_per_sample: float) -> None:
        d, draft = self.width, self.draft
        linear = nn.Linear(d, d, device=solution.device)
        linear.weight = nn.Parameter(solution[:-1].T.contiguous(), requires_grad=False)
        linear.bias = nn.Parameter(solution[-1].clone(), requires_grad=False)
        tower = next(layer.tower for layer in draft.session.layers if layer.name.startswith(f"{self.name}."))
        draft.attach(self.name, linear)
        draft.structure.append({"kind": COMPENSATION, "block": self.name, "width": d})
        macs, why = rows_per_sample * d * d, "compensates its block in float"
        entry = MapEntry(f"{self.name}.{COMPENSATION}", tower, "linear", FLOAT_BITS, FLOAT_BITS, macs, reason=why)
        draft.plan = QuantizationMap((*draft.plan.entries, entry))
