"""What one forward pass costs: multiply-accumulates of every product, and the size of what a layer sees."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lit_clipq.calibration.operators import OperatorCount
from lit_clipq.nn.swap import Layer


@dataclass
class Profile:
    """Cost per calibration sample."""

    macs: dict[str, float] = field(default_factory=dict)
    """Multiply-accumulates by layer; products outside of any layer under `<module> (operator)`."""
    input_elements: dict[str, float] = field(default_factory=dict)
    """Elements of all operands by layer."""
    output_elements: dict[str, float] = field(default_factory=dict)
    """Elements of the output by layer."""


def profile(
    roots: Mapping[str, nn.Module], layers: Sequence[Layer], forward: Callable[[Any], Any], batch: Any, samples: int
) -> Profile:
    """Measure one batch.

    Products that run outside of the given layers (an attention nobody could take apart, a product of bare parameters, a
    layer whose weight another module reads instead of calling it) are found as the difference to the count of all
    operators. A layer that the batch does not reach has no entry.

    Args:
        roots: Named networks.
        layers: Their quantizable layers, still float.
        forward: Runs the networks on a batch.
        batch: One calibration batch.
        samples: Samples in it.
    """
    result = Profile()
    with _count_calls(layers, result), torch.no_grad(), OperatorCount() as counter:
        forward(batch)
    for counts in (result.macs, result.input_elements, result.output_elements):
        for name in counts:
            counts[name] /= samples
    rest = counter.macs / samples - sum(result.macs.values())
    if rest > 1e-6 * counter.macs / samples:  # more than what division rounds
        result.macs[f"{'+'.join(roots)} (products outside of layers)"] = rest
    return result


def merged(profiles: Iterable[Profile]) -> Profile:
    """Join profiles of different batches or ranks: of each name the largest count."""
    result = Profile()
    for one in profiles:
        for counts, new in (
            (result.macs, one.macs),
            (result.input_elements, one.input_elements),
            (result.output_elements, one.output_elements),
        ):
            counts.update({name: max(value, counts.get(name, 0.0)) for name, value in new.items()})
    return result


@contextmanager
def _count_calls(layers: Sequence[Layer], result: Profile) -> Iterator[None]:
    def watch(layer: Layer) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            elements = sum(x.numel() for x in inputs)
            for counts, value in (
                (result.macs, layer.kind.macs(module, inputs, output)),
                (result.input_elements, elements),
                (result.output_elements, output.numel()),
            ):
                counts[layer.name] = counts.get(layer.name, 0.0) + value

        return hook

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.module.register_forward_hook(watch(layer)).remove)
        yield
