"""Running minimum and maximum of every operand, over batches and ranks."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lit_clipq.calibration.passes import Observer
from lit_clipq.calibration.recorder import Watched
from lit_clipq.distributed import gather
from lit_clipq.errors import CalibrationError
from lit_clipq.functional.granularity import Granularity, at_run_time, extrema

Key = tuple[str, str]
"""Layer and operand."""
Ranges = dict[Key, tuple[Tensor, Tensor]]
"""Minimum and maximum of an operand, each of the scale shape of its granularity."""


@dataclass
class RangeObserver(Observer):
    """Minima and maxima of operands.

    Attributes:
        layers: Layers by name.
        operands: For each layer the granularity of each operand, by name and place; those with scales at run
            time are left out, as they need no calibration.
        own: What this rank saw.
    """

    layers: Mapping[str, Watched]
    operands: Mapping[str, Mapping[tuple[int, str], Granularity]]
    own: Ranges = field(default_factory=dict)

    def hooks(self) -> Iterator[RemovableHandle]:
        """Hook every layer that has operands to look at."""
        for name, watched in self.layers.items():
            if self.operands.get(name):
                yield watched.module.register_forward_pre_hook(self._watch(name, watched))

    def _watch(self, name: str, watched: Watched) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            mask = self.rows.mask(text=watched.text, averages=watched.averages)
            if mask is not None or watched.layout.constants:
                inputs = watched.layout.operands(inputs, mask)
            for (place, operand), granularity in self.operands[name].items():
                if not at_run_time(granularity):
                    _widen(self.own, (name, operand), extrema(inputs[place].detach(), granularity))

        return hook

    def merged(self) -> Ranges:
        """Return the ranges over all ranks, on the device of the layer; a collective call.

        Raises:
            CalibrationError: If a layer saw NaN or Inf, or no batch on any rank; names the layer.
        """
        merged = _merge(self.own)
        needed = [
            (name, operand)
            for name, operands in self.operands.items()
            for (_, operand), granularity in operands.items()
            if not at_run_time(granularity)
        ]
        unseen = sorted({name for name, operand in needed if (name, operand) not in merged})
        if unseen:
            raise CalibrationError(
                f"layer {unseen[0]} saw 0 calibration batches ({len(unseen)} such layers); give batches that reach it "
                "(pictures for the image tower, texts for the text tower) or exclude it"
            )
        bad = [name for name, operand in needed if not all(bool(v.isfinite().all()) for v in merged[name, operand])]
        if bad:
            raise CalibrationError(
                f"layer {bad[0]} received NaN or Inf in calibration ({len(set(bad))} layers from there on); check the "
                "calibration samples and the weights in front of it"
            )
        return merged


def _widen(ranges: Ranges, key: Key, new: tuple[Tensor, Tensor]) -> None:
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
