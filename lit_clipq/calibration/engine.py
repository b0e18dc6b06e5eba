"""The stage on which a recipe's handler works: the networks, the plan for their layers, the calibration batches."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lit_clipq.calibration.profile import Profile
from lit_clipq.errors import CalibrationError
from lit_clipq.nn.modules import QModule
from lit_clipq.nn.swap import Layer, MapEntry, QuantizationMap, swap, unswap
from lit_clipq.search.layer import LayerResult

_FLOAT_BYTES = 4
_WORKING_COPIES = 3  # of a layer's operands and outputs in its search


@dataclass(frozen=True)
class Storage:
    """How observations are kept between a pass and the search."""

    element_bytes: int = _FLOAT_BYTES
    """Size of an element: 4 in float32, 2 in bfloat16."""
    gradients: bool = True
    """Whether squared output gradients are kept beside the operands."""
    token_share: float = 1.0
    """Share of the rows of linear layers that is kept."""


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
        samples: Calibration samples of the rank that has most, so that all ranks plan the same passes.
        memory_limit_bytes: Bound on stored operands, gradients and search workspace; `None` is no bound.
        modules: Q-modules by name, once swapped.
        results: How the search of each layer went, where the recipe searches.
        equalized: By the name of what makes channels that were equalised: expected error over that without.
        progress: Told the name of each layer that is done.
        on_undo: What else `undo` takes back, the last first.
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
    equalized: dict[str, float] = field(default_factory=dict)
    progress: Callable[[str], None] = lambda _: None
    on_undo: list[Callable[[], None]] = field(default_factory=list)

    def swap(self, build: Callable[[Layer, MapEntry], QModule]) -> dict[str, QModule]:
        """Replace the layers that the plan quantizes by `build(layer, its entry)`; returns them by name."""
        entries = {entry.name: entry for entry in self.plan.quantized}
        chosen = [layer for layer in self.layers if layer.name in entries]
        self.modules = swap(self.roots, chosen, lambda layer: build(layer, entries[layer.name]))
        return self.modules

    def undo(self) -> None:
        """Put the float layers back, as they were."""
        unswap(self.roots, self.layers, self.modules)
        self.modules = {}
        while self.on_undo:
            self.on_undo.pop()()

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next((p.device for root in self.roots.values() for p in root.parameters()), torch.device("cpu"))

    def stored_bytes(self, name: str, storage: Storage) -> int:
        """Predict the bytes of a layer's operands and squared output gradients over the samples of a rank."""
        elements = self.cost.input_elements.get(name, 0.0)
        if storage.gradients:
            elements += self.cost.output_elements.get(name, 0.0)
        return int(elements * self.samples * storage.element_bytes * self._share(name, storage))

    def workspace_bytes(self, name: str, storage: Storage) -> int:
        """Predict the bytes that the search of a layer needs on top: rounded operands, targets, candidates' outputs."""
        elements = self.cost.input_elements.get(name, 0.0) + self.cost.output_elements.get(name, 0.0)
        return int(_WORKING_COPIES * elements * self.samples * _FLOAT_BYTES * self._share(name, storage))

    def _share(self, name: str, storage: Storage) -> float:
        """Return the share of a layer's units that is kept."""
        return storage.token_share if name in self._linear else 1.0

    @cached_property
    def _linear(self) -> frozenset[str]:
        return frozenset(layer.name for layer in self.layers if layer.kind.name == "linear")

    def groups(self, storage: Storage | None = None) -> list[list[str]]:
        """Split the layers that the plan quantizes into as few passes as the memory limit allows, in order.

        The same on every rank.

        Args:
            storage: How observations are kept.

        Raises:
            CalibrationError: If the limit is below what one layer needs; says how much that is.
        """
        limit, groups = self.memory_limit_bytes, [[]]  # type: tuple[int | None, list[list[str]]]
        storage = storage or Storage()
        for name in searched_layers(self):
            if limit is not None and self.group_bytes([name], storage) > limit:
                raise CalibrationError(
                    f"calibrating {name} needs {self.group_bytes([name], storage) / 1e9:.3f} GB beside the model, the "
                    f"limit is {limit / 1e9:.3f} GB; raise memory_limit_gb or lower calibration_samples"
                )
            if limit is not None and groups[-1] and self.group_bytes([*groups[-1], name], storage) > limit:
                groups.append([])
            groups[-1].append(name)
        return [group for group in groups if group]

    def group_bytes(self, group: Sequence[str], storage: Storage | None = None) -> int:
        """Predict the bytes that a pass over the given layers and their search need."""
        storage = storage or Storage()
        stored = sum(self.stored_bytes(name, storage) for name in group)
        return stored + max((self.workspace_bytes(name, storage) for name in group), default=0)


def sample_counts(batch: Any) -> tuple[int, ...]:
    """Return the different numbers of samples that the tensors of a batch hold, largest first."""
    tensors = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else [batch]
    return tuple(sorted({len(x) for x in tensors if isinstance(x, Tensor) and x.dim()}, reverse=True)) or (1,)


def count_samples(batch: Any) -> int:
    """Return the number of samples in a batch: the length of its longest tensor."""
    return sample_counts(batch)[0]


def one_of_each_kind(batches: Iterable[Any]) -> Iterator[Any]:
    """Yield the first batch of each kind: which parts it has, of what types and with how many axes.

    A set of pairs has one kind; one whose pictures and texts come in batches of their own has two.
    """
    seen = set()
    for batch in batches:
        kind = _kind(batch)
        if kind not in seen:
            seen.add(kind)
            yield batch


def _kind(batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return batch.dtype, batch.dim()
    if isinstance(batch, Mapping):
        return tuple((name, _kind(value)) for name, value in batch.items())
    return tuple(_kind(value) for value in batch) if isinstance(batch, list | tuple) else type(batch)


def searched_layers(calibration: Calibration) -> list[str]:
    """Return the products that the plan quantizes and a calibration batch reaches, in order of the network."""
    cost = calibration.cost
    return [e.name for e in calibration.plan.quantized if cost.macs.get(e.name) and e.name in cost.input_elements]
