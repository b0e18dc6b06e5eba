"""Let layers compute as if they were frozen, and be float again afterwards."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from lit_clipq.nn.modules import Phase, QModule, QWeighted

Parameters = tuple[Tensor | None, Tensor | None]
"""Weight and bias of a layer."""


def parameters_of(module: QModule) -> Parameters:
    """Return the float weight and bias that a layer holds now."""
    return (module._parameters.get("weight"), module.bias) if isinstance(module, QWeighted) else (None, None)


@contextmanager
def holding(modules: Mapping[str, QModule], parameters: Mapping[str, Parameters]) -> Iterator[None]:
    """Let layers hold other weights and biases while the context is open; what they held comes back however it ends.

    Args:
        modules: Layers in their float phase, by name.
        parameters: What they hold meanwhile.
    """
    weighted = {name: module for name, module in modules.items() if isinstance(module, QWeighted)}
    held = {name: parameters_of(module) for name, module in weighted.items()}
    try:
        for name, module in weighted.items():
            _put(module, *parameters[name])
        yield
    finally:
        for name, module in weighted.items():
            _put(module, *held[name])


@torch.no_grad()
def rounded_weight(module: QWeighted) -> Tensor:
    """Return the weight that freezing the layer would give it, same shape and type."""
    return module.rounded_weight()


@contextmanager
def emulated(modules: Mapping[str, QModule], rounded: Mapping[str, Parameters]) -> Iterator[None]:
    """Quantize layers while the context is open; their float weights and biases come back however it ends.

    Args:
        modules: Calibrated layers that are not frozen, by name.
        rounded: Weight and bias that those with a weight take meanwhile.
    """
    floats = {name: (m._parameters.get("weight"), m.bias) for name, m in modules.items() if isinstance(m, QWeighted)}
    try:
        for name, module in modules.items():
            module.phase = Phase.QUANTIZED
            if isinstance(module, QWeighted):
                _put(module, *rounded[name])
        yield
    finally:
        for name, module in modules.items():
            module.phase = Phase.FLOAT
            if isinstance(module, QWeighted):
                _put(module, *floats[name])


def _put(module: QWeighted, weight: Tensor | None, bias: Tensor | None) -> None:
    """Set weight and bias without changing which of them are parameters of the layer."""
    for name, value in (("weight", weight), ("bias", bias)):
        store = module._parameters if name in module._parameters else module.__dict__
        store[name] = value  # type: ignore[assignment]
