"""What stands in front of a layer, found by running the network and not by names.

A layer's operand is the output of an activation if it is the very tensor that the activation returned, its memory still
taken by it and not written to since; it is a softmax if its rows are non-negative and add up to 1.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.hooks import RemovableHandle

from lit_clipq.calibration.passes import Observer
from lit_clipq.distributed import gather
from lit_clipq.nn.matmul import MatMul
from lit_clipq.nn.swap import Layer

Tensors = tuple[Tensor, ...]


@dataclass
class Sources:
    """What stands in front of the layers.

    Attributes:
        minima: Smallest value that the activation in front of a layer can take, by layer; only where it is negative and
            finite.
        averages: Products whose left operand is a softmax.
    """

    minima: dict[str, float] = field(default_factory=dict)
    averages: set[str] = field(default_factory=set)


class SourceObserver(Observer):
    """Looks at what reaches each layer; what does not hold in every call does not count.

    Args:
        roots: Named networks, float.
        layers: Their quantizable layers.
    """

    whole_set = False

    def __init__(self, roots: Mapping[str, nn.Module], layers: Sequence[Layer]) -> None:
        self.roots, self.layers = roots, layers
        self._minima: dict[str, set[float | None]] = {}
        self._averages: dict[str, bool] = {}
        self._produced: dict[tuple[int, torch.Size], _Product] = {}
        self._known: dict[nn.Module, float | None] = {}

    def hooks(self) -> Iterator[RemovableHandle]:
        """Hook every module without children and parameters, and every layer."""
        for root in self.roots.values():
            for module in root.modules():
                bare = not any(True for _ in module.children()) and not any(True for _ in module.parameters())
                if bare and not isinstance(module, nn.Identity | nn.Dropout | MatMul):
                    yield module.register_forward_hook(self._remember)
        for layer in self.layers:
            yield layer.module.register_forward_pre_hook(self._look_at(layer))

    def found(self) -> Sources:
        """Return what was found, over all ranks; a collective call."""
        alike = {name: next(iter(found)) for name, found in self._minima.items() if len(found) == 1}
        own = Sources(
            {name: minimum for name, minimum in alike.items() if minimum is not None},
            {name for name, holds in self._averages.items() if holds},
        )
        return _joined(gather(own))

    def end(self, outputs: Any) -> None:  # noqa: ARG002
        """Forget the memory of this batch."""
        self._produced.clear()

    def _remember(self, module: nn.Module, _: Tensors, output: Any) -> None:
        if self.looks and isinstance(output, Tensor):
            self._produced[output.data_ptr(), output.shape] = _Product(module, output)

    def _look_at(self, layer: Layer) -> Callable[[nn.Module, Tensors], None]:
        def hook(_: nn.Module, inputs: Tensors) -> None:
            if not self.looks:
                return
            if layer.kind.is_product_of_activations:
                self._averages[layer.name] = self._averages.get(layer.name, True) and _is_softmax(inputs[0])
                return
            source = self._produced.get((inputs[0].data_ptr(), inputs[0].shape))
            minimum = None
            if source is not None and source.is_still(inputs[0]):
                if source.module not in self._known:
                    self._known[source.module] = minimum_of(source.module)
                minimum = self._known[source.module]
            self._minima.setdefault(layer.name, set()).add(minimum)

        return hook


def _joined(found: Iterable[Sources]) -> Sources:
    """Join what ranks found; ranks without batches found nothing."""
    result = Sources()
    for one in found:
        result.minima.update(one.minima)
        result.averages |= one.averages
    return result


class _Product:
    """The tensor that an activation returned, known by its memory, which is not kept from being freed or changed."""

    def __init__(self, module: nn.Module, output: Tensor) -> None:
        self.module = module
        self.storage = StorageWeakRef(output.untyped_storage())
        self.version = output._version

    def is_still(self, x: Tensor) -> bool:
        """Whether `x`, at the same address, is that tensor with the same values."""
        return not self.storage.expired() and x._version == self.version


def _is_softmax(x: Tensor) -> bool:
    rows, rounding = x.float(), max(1e-3, torch.finfo(x.dtype).eps) if x.is_floating_point() else 0.0
    return bool((rows >= 0).all()) and bool((rows.sum(dim=-1) - 1).abs().max() < rounding)


def minimum_of(activation: nn.Module) -> float | None:
    """Return the minimum of an elementwise activation where it is negative and bounded, else `None`.

    The function is evaluated densely and the best point refined; QuickGELU has -0.16361 at x = -0.751, GELU -0.16997.
    """
    wide = torch.linspace(-20, 20, 40001)
    with torch.no_grad():
        try:
            values = activation(wide.clone())  # it may write into its input
        except (RuntimeError, TypeError, ValueError, IndexError):
            return None  # not a function of one element: a normalisation, a pooling
        if values.shape != wide.shape or not bool(values.isfinite().all()):
            return None
        far = activation(torch.tensor([-1e4, 1e4]))
        lowest = int(values.argmin())
        if float(far.min()) < float(values[lowest]) or float(values[lowest]) >= -1e-6:
            return None
        fine = torch.linspace(float(wide[max(lowest - 1, 0)]), float(wide[min(lowest + 1, 40000)]), 10001)
        return float(activation(fine).min())
