"""The stage on which a recipe's handler works: the networks, the plan for their layers, the calibration batches."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lit_clipq.nn.modules import QModule
from lit_clipq.nn.swap import Layer, MapEntry, QuantizationMap, swap, unswap


@dataclass
class Calibration:
    """One calibration of one set of networks.

    Attributes:
        roots: Named networks, float until `swap`.
        layers: Their quantizable layers.
        plan: What is to become of each layer.
        batches: Calibration batches; iterated once a pass.
        forward: Runs the networks on a batch and returns the outputs that matter.
        modules: Q-modules by name, once swapped.
    """

    roots: Mapping[str, nn.Module]
    layers: list[Layer]
    plan: QuantizationMap
    batches: Iterable[Any]
    forward: Callable[[Any], Any]
    modules: dict[str, QModule] = field(default_factory=dict)

    def swap(self, build: Callable[[Layer, MapEntry], QModule]) -> dict[str, QModule]:
        """Replace the layers that the plan quantizes by `build(layer, its entry)`; returns them by name."""
        entries = {entry.name: entry for entry in self.plan.quantized}
        chosen = [layer for layer in self.layers if layer.name in entries]
        self.modules = swap(self.roots, chosen, lambda layer: build(layer, entries[layer.name]))
        return self.modules

    def undo(self) -> None:
        """Put the float layers back."""
        unswap(self.roots, self.layers, self.modules)
        self.modules = {}
