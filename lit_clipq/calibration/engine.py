"""The stage on which a recipe's handler works: the networks, the plan for their layers, the calibration batches."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lit_clipq.calibration.layer_search import LayerResult
from lit_clipq.calibration.profile import Profile
from lit_clipq.errors import CalibrationError
from lit_clipq.nn.modules import QModule
from lit_clipq.nn.swap import Layer, MapEntry, QuantizationMap, swap, unswap

_FLOAT_BYTES = 4


@dataclass
class Calibration:
    """One calibration of one set of networks.

    Attributes:
        roots: Named networks, float until `swap`.
        layers: Their quantizable layers.
        plan: What is to become of each layer.
        batches: Calibration batches; iterated once a pass.
        forward: Runs the networks on a batch and returns the outputs that matter, by name.
        cost: What the layers see of one sample.
        samples: Calibration samples of this rank.
        memory_limit_bytes: Bound on stored operands, gradients and search workspace; `None` is no bound.
        modules: Q-modules by name, once swapped.
        results: How the search of each layer went, where the recipe searches.
        progress: Told the name of each layer that is done.
    """

    roots: Mapping[str, nn.Module]
    layers: list[Layer]
    plan: QuantizationMap
    batches: Iterable[Any]
    forward: Callable[[Any], Mapping[str, Tensor]]
    cost: Profile
    samples: int
    memory_limit_bytes: int | None = None
    modules: dict[str, QModule] = field(default_factory=dict)
    results: dict[str, LayerResult] = field(default_factory=dict)
    progress: Callable[[str], None] = lambda _: None

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

    def stored_bytes(self, name: str) -> int:
        """Predict the bytes of a layer's operands and squared output gradients over this rank's samples."""
        elements = self.cost.input_elements.get(name, 0.0) + self.cost.output_elements.get(name, 0.0)
        return int(elements * self.samples * _FLOAT_BYTES)

    def workspace_bytes(self, name: str) -> int:
        """Predict the bytes that the search of a layer needs on top: rounded operands, targets, candidates' outputs."""
        elements = 2 * self.cost.input_elements.get(name, 0.0) + 3 * self.cost.output_elements.get(name, 0.0)
        return int(elements * self.samples * _FLOAT_BYTES)

    def groups(self, fixed: Sequence[Sequence[str]] | None = None) -> list[list[str]]:
        """Split the layers that the plan quantizes into as few passes as the memory limit allows, in order.

        Args:
            fixed: Groups to check against the limit instead.

        Raises:
            CalibrationError: If the limit is below what one group or layer needs; says how much that is.
        """
        names = searched_layers(self)
        groups: list[list[str]] = [list(group) for group in fixed] if fixed is not None else _packed(self, names)
        limit = self.memory_limit_bytes
        for group in groups:
            if limit is not None and self.group_bytes(group) > limit:
                raise CalibrationError(
                    f"calibrating {group[0]} needs {self.group_bytes(group) / 1e9:.3f} GB beside the model, the limit "
                    f"is {limit / 1e9:.3f} GB; raise memory_limit_gb or lower calibration_samples"
                )
        return groups

    def group_bytes(self, group: Sequence[str]) -> int:
        """Predict the bytes that a pass over the given layers and their search need."""
        stored = sum(self.stored_bytes(name) for name in group)
        return stored + max((self.workspace_bytes(name) for name in group), default=0)


def _packed(calibration: Calibration, names: Sequence[str]) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    for name in names:
        limit = calibration.memory_limit_bytes
        if limit is not None and groups[-1] and calibration.group_bytes([*groups[-1], name]) > limit:
            groups.append([])
        groups[-1].append(name)
    return [group for group in groups if group]


def count_samples(batch: Any) -> int:
    """Return the number of samples in a batch: the length of its longest tensor."""
    tensors = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else [batch]
    return max((len(x) for x in tensors if isinstance(x, Tensor)), default=1)


def searched_layers(calibration: Calibration) -> list[str]:
    """Return the products that the plan quantizes and a calibration batch reaches, in order of the network."""
    cost = calibration.cost
    return [e.name for e in calibration.plan.quantized if cost.macs.get(e.name) and e.name in cost.input_elements]
