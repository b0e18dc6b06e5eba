"""Minimum and maximum over the calibration set."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lit_clipq.calibration.needs import Need, Write
from lit_clipq.errors import ConfigError
from lit_clipq.functional.granularity import at_run_time, extrema
from lit_clipq.nn.modules import QWeighted
from lit_clipq.nn.quantizer import UniformQuantizer
from lit_clipq.stages.stage import LayerStage, LayerTask, Stage, stage


@stage("ranges")
@dataclass(frozen=True)
class Ranges(LayerStage):
    """Give every uniform grid the range of its operand: running minimum and maximum over all batches and ranks.

    Positions behind a text's end token are left out where they cannot reach the output.
    """

    needs = frozenset({Need.RANGES})
    writes = frozenset({Write.SCALES})
    forbids = frozenset({"search"})
    tables = True

    def check_behind(self, before: Sequence[Stage]) -> None:
        """Refuse twin and adaptive grids, which minimum and maximum do not decide."""
        kinds = ("twin", "adalog", "best")
        other = [(s.name, n, value) for s in before for n, value in s.options().items() if value in kinds]
        if other:
            stage, option, value = other[0]
            raise ConfigError(
                f"stage ranges cannot calibrate {option}: {value} of stage {stage}; put search in its place, or give "
                f"{option}: uniform"
            )

    def fit(self, task: LayerTask) -> Any:
        """Set the ranges of one layer.

        Raises:
            ConfigError: For a grid that minimum and maximum do not decide.
        """
        module = task.module
        for operand, quantizer in module.operand_quantizers.items():
            if isinstance(quantizer, UniformQuantizer):
                if not at_run_time(quantizer.granularity):
                    quantizer.set_range(*task.ranges[task.name, operand])
            elif not quantizer.calibrated:
                raise ConfigError(
                    f"stage ranges cannot calibrate the {type(quantizer).__name__} of {task.name}; put search in its "
                    "place, or give grids `softmax: uniform, gelu: uniform`"
                )
        if isinstance(module, QWeighted) and isinstance(module.weight_quantizer, UniformQuantizer):
            module.weight_quantizer.set_range(*extrema(module.coded_weight(), module.weight_quantizer.granularity))
        return None
