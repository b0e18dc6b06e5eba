"""Running minimum and maximum of every operand, over batches and ranks."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lit_clipq.calibration.collect import Rows, valid_operands
from lit_clipq.distributed import gather
from lit_clipq.errors import CalibrationError
from lit_clipq.functional.granularity import PerToken, extrema
from lit_clipq.nn.modules import QModule

if TYPE_CHECKING:
    from lit_clipq.calibration.engine import Calibration

Ranges = dict[tuple[str, str], tuple[Tensor, Tensor]]


def collect_ranges(modules: Mapping[str, QModule], calibration: "Calibration", rows: Rows | None = None) -> Ranges:
    """Run the calibration batches and return {(layer, operand): (minimum, maximum)} over all ranks.

    Each has the scale shape of the operand's quantizer, on the layer's device. The hooks are removed however this
    ends. `PerToken` operands have no entry: they need no calibration.

    Args:
        modules: Layers by name.
        calibration: Batches and how to run them.
        rows: Tells, while a batch runs, the lengths of its texts; what the text tower computes behind them is left out.

    Raises:
        CalibrationError: If a layer saw NaN or Inf, or no batch on any rank; names the layer.
    """
    own: Ranges = {}
    rows = rows or Rows(torch.zeros(0, dtype=torch.int64))
    text = {layer.name for layer in calibration.layers if layer.tower == "text"}

    def watch(name: str, module: QModule) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if name in text:
                inputs = valid_operands(module, inputs, rows, averages=name.endswith(".av"))
            for operand, quantizer in module.operand_quantizers.items():
                if not isinstance(quantizer.granularity, PerToken):
                    x = inputs[module.operands.index(operand)].detach()
                    _widen(own, (name, operand), extrema(x, quantizer.granularity))

        return hook

    with ExitStack() as stack, torch.no_grad():
        for name, module in modules.items():
            stack.callback(module.register_forward_pre_hook(watch(name, module)).remove)
        for batch in calibration.batches:
            rows.lengths = None
            calibration.forward(batch)
    merged = _merge(own)
    _check(modules, merged)
    return merged


def _widen(ranges: Ranges, key: tuple[str, str], new: tuple[Tensor, Tensor]) -> None:
    if key in ranges:
        new = torch.minimum(ranges[key][0], new[0]), torch.maximum(ranges[key][1], new[1])
    ranges[key] = new


def _merge(own: Ranges) -> Ranges:
    """Combine ranks; one whose shard missed a layer has no say in its range."""
    devices = {key: low.device for key, (low, _) in own.items()}
    default = next(iter(devices.values()), torch.device("cpu"))
    merged: Ranges = {}
    for ranges in gather({key: (low.cpu(), high.cpu()) for key, (low, high) in own.items()}):
        for key, new in ranges.items():
            _widen(merged, key, new)
    return {
        key: (low.to(devices.get(key, default)), high.to(devices.get(key, default)))
        for key, (low, high) in merged.items()
    }


def _check(modules: Mapping[str, QModule], ranges: Ranges) -> None:
    needed = [
        (name, operand)
        for name, module in modules.items()
        for operand, quantizer in module.operand_quantizers.items()
        if not isinstance(quantizer.granularity, PerToken)
    ]
    unseen = sorted({name for name, operand in needed if (name, operand) not in ranges})
    if unseen:
        raise CalibrationError(
            f"layer {unseen[0]} saw 0 calibration batches ({len(unseen)} such layers); give batches that reach it "
            "(pictures for the image tower, texts for the text tower) or exclude it"
        )
    bad = [name for name, operand in needed if not all(bool(v.isfinite().all()) for v in ranges[name, operand])]
    if bad:
        raise CalibrationError(
            f"layer {bad[0]} received NaN or Inf in calibration ({len(set(bad))} layers from there on); check the "
            "calibration samples and the weights in front of it"
        )
