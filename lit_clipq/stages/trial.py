"""A layer stage that may lose is tried: fitted on three of four samples, judged on the fourth, kept or undone."""

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from lit_clipq.search.data import LayerData
from lit_clipq.search.rounded import rounded_error
from lit_clipq.stages.stage import LayerTask, finite


def trial(task: LayerTask, fit: Callable[[LayerData], Mapping[str, Any] | None]) -> dict[str, Any]:
    """Fit a layer, and take it back to the bit if it is worse on samples that it was not fitted to.

    What is compared is the recipe's own objective, `sum w (O^ - O)^2` of the layer with all of its operands rounded: w
    are squared gradients where the recipe collects them, else 1. Every fourth sample is held out, by its global number.
    Nothing is kept where no unit is held out (a single sample), or where the objective is not finite.

    Args:
        task: The layer. All of its grids have their scales.
        fit: Called with what to fit on. It changes `task.module` by giving it new tensors, grids or submodules, and may
            add to `task.structure`; what it returns goes into the report.

    Returns:
        The report of the layer: `before` and `after` on what was held out, `kept`, and what `fit` told.

    Example:
        In a layer stage::

            def fit(self, task):
                return trial(task, lambda data: self.shift(task.module, data))
    """
    fitted, judged = task.data.split(task.distance)
    state, module, entries = _state(task.module), task.module, len(task.structure)
    before, units = rounded_error(task.module, judged, task.distance)
    told = dict(fit(fitted) or {}) if units else {"reason": "no sample to be judged on"}
    after = rounded_error(task.module, judged, task.distance)[0] if units else before
    kept = bool(units) and math.isfinite(after) and after <= before
    if not kept:
        task.module = module
        _restore(state)
        del task.structure[entries:]
    return {"before": finite(before), "after": finite(after), "kept": kept, **told}


_State = list[tuple[nn.Module, dict[str, Any]]]


def _state(module: nn.Module) -> _State:
    """Return what a layer and its grids hold; tensors are never written to, so that they need not be copied."""
    return [(m, {k: copy.copy(v) if isinstance(v, dict) else v for k, v in vars(m).items()}) for m in module.modules()]


def _restore(state: _State) -> None:
    for module, held in state:
        vars(module).clear()
        vars(module).update(held)
