"""Outlier channels of linear layers stay in float (LLM.int8(), arXiv 2208.07339)."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from lit_clipq.calibration.needs import Need, Write
from lit_clipq.errors import ConfigError
from lit_clipq.functional.granularity import PerChannel
from lit_clipq.nn.modules import QLinear
from lit_clipq.nn.outliers import OutlierLinear, channels_above_quantile, channels_at_least
from lit_clipq.nn.swap import QuantizationMap
from lit_clipq.stages.draft import Draft
from lit_clipq.stages.stage import GridStage, Report, stage


@stage("llm_int8")
@dataclass(frozen=True)
class LLMInt8(GridStage):
    """Multiply the input channels of linear layers that hold outliers in float, apart from the others.

    Which channels those are is found once, on the calibration set, so that a saved model has them as constants. The map
    says what share of a layer's products stays float.
    """

    needs = frozenset({Need.SOURCES})
    reads = frozenset({Write.GRIDS})
    writes = frozenset({Write.STRUCTURE})
    forbids = frozenset({"ranges", "search"})

    threshold: float = 6.0
    """Channels with a magnitude of at least this are outliers: 0 leaves all of them float, infinity (`.inf`) none."""
    quantile: float | None = None
    """If given, outliers are the channels above this quantile of the largest magnitudes of a layer's channels instead:
    0.99 leaves one channel of a hundred in float, whatever their size."""

    passes = 1

    def hides(self) -> str:
        """Refuse stages that know one product for a layer, not two."""
        return "stage llm_int8 computes a layer as two products"

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise ConfigError(f"threshold of stage llm_int8 must be at least 0, got {self.threshold}")
        if self.quantile is not None and not 0 <= self.quantile <= 1:
            raise ConfigError(f"quantile of stage llm_int8 must be 0 to 1, got {self.quantile}")

    @torch.no_grad()
    def assign(self, draft: Draft) -> Report:
        """Choose the outliers; the report has their number by layer, of those that have some, or why none has."""
        searched = set(draft.session.searched(draft.plan))
        linear = {n: m for n, m in draft.modules.items() if type(m) is QLinear and m.operand_quantizers}
        seen = {name: module for name, module in linear.items() if name in searched}
        with draft.scaled_in_place():
            ranges = draft.session.ranges({name: {(0, "input"): PerChannel(-1)} for name in seen})
        report: dict[str, Any] = {}
        shares = {}
        for name, module in seen.items():
            low, high = ranges[name, "input"]
            magnitude = torch.maximum(low.abs(), high.abs())
            if self.quantile is not None:
                channels = channels_above_quantile(magnitude, self.quantile)
            else:
                channels = channels_at_least(magnitude, self.threshold)
            if len(channels):
                kept = OutlierLinear(draft.session.layer[name].module, *module.quantizers)  # type: ignore[arg-type]
                draft.add(name, kept)
                kept.keep(channels)
                report[name], shares[name] = len(channels), len(channels) / module.in_features
        entries = (replace(e, float_share=shares.get(e.name, e.float_share)) for e in draft.plan.entries)
        draft.plan = QuantizationMap(tuple(entries))
        reason = "no channel of a linear layer with a grid for its input is an outlier"
        return report or {"reason": reason}
