"""What stands in front of a layer, found by running the network and not by names.

A layer's operand is the output of an activation if it is the very tensor that the activation returned, its memory still
taken by it and not written to since; it is a softmax if its rows are non-negative and add up to 1.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from lit_clipq.nn.matmul import MatMul
from lit_clipq.nn.swap import Layer

Tensors = tuple[Tensor, ...]


@dataclass
class Probe:
    """What one batch told about the network.

    Attributes:
        minima: Smallest value that the activation in front of a layer can take, by layer; only where it is negative and
            finite.
        averages: Products whose left operand is a softmax.
    """

    minima: dict[str, float] = field(default_factory=dict)
    averages: set[str] = field(default_factory=set)


def probe(
    roots: Mapping[str, nn.Module], layers: Iterable[Layer], forward: Callable[[Any], Any], batches: Iterable[Any]
) -> Probe:
    """Run batches and look at what reaches each layer; what does not hold in every call does not count.

    Args:
        roots: Named networks, float.
        layers: Their quantizable layers.
        forward: Runs the networks on a batch.
        batches: Calibration batches; one of each kind will do.
    """
    minima: dict[str, set[float | None]] = {}
    averages: dict[str, bool] = {}
    produced: dict[tuple[int, torch.Size], _Product] = {}
    known: dict[nn.Module, float | None] = {}

    def remember(module: nn.Module, _: Tensors, output: Any) -> None:
        if isinstance(output, Tensor):
            produced[output.data_ptr(), output.shape] = _Product(module, output)

    def look(layer: Layer) -> Callable[[nn.Module, Tensors], None]:
        def hook(_: nn.Module, inputs: Tensors) -> None:
            if isinstance(layer.module, MatMul):
                averages[layer.name] = averages.get(layer.name, True) and _is_softmax(inputs[0])
                return
            source = produced.get((inputs[0].data_ptr(), inputs[0].shape))
            minimum = None
            if source is not None and source.is_still(inputs[0]):
                if source.module not in known:
                    known[source.module] = minimum_of(source.module)
                minimum = known[source.module]
            minima.setdefault(layer.name, set()).add(minimum)

        return hook

    with ExitStack() as stack, torch.no_grad():
        for root in roots.values():
            for module in root.modules():
                bare = not any(True for _ in module.children()) and not any(True for _ in module.parameters())
                if bare and not isinstance(module, nn.Identity | nn.Dropout | MatMul):
                    stack.callback(module.register_forward_hook(remember).remove)
        for layer in layers:
            stack.callback(layer.module.register_forward_pre_hook(look(layer)).remove)
        for batch in batches:
            forward(batch)
    alike = {name: next(iter(found)) for name, found in minima.items() if len(found) == 1}
    return Probe(
        {name: minimum for name, minimum in alike.items() if minimum is not None},
        {name for name, holds in averages.items() if holds},
    )


def joined(probes: Iterable[Probe]) -> Probe:
    """Join what ranks found; ranks without batches found nothing."""
    result = Probe()
    for one in probes:
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
    rows = x.float()
    return bool((rows >= 0).all()) and bool((rows.sum(dim=-1) - 1).abs().max() < 1e-3)


def minimum_of(activation: nn.Module) -> float | None:
    """Return the minimum of an elementwise activation where it is negative and bounded, else `None`.

    The function is evaluated densely and the best point refined; QuickGELU has -0.16361 at x = -0.751, GELU -0.16997.
    """
    wide = torch.linspace(-20, 20, 40001)
    with torch.no_grad():
        try:
            values = activation(wide)
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
