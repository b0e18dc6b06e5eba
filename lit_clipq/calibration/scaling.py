"""Channels divided by powers of two where they are made and multiplied where they are read.

The function of the network stays the same to the bit. So does what was observed of it, up to these factors: it is
scaled when it is looked at, and one collection serves networks whose channels are scaled differently.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lit_clipq.calibration.batches import PLACES
from lit_clipq.calibration.channels import Link
from lit_clipq.calibration.observations import Observations


@dataclass(frozen=True)
class ChannelScaling:
    """One link, and what its channels are divided by."""

    link: Link
    factors: Tensor
    """Powers of two, float64 (channels,) on the CPU."""


@torch.no_grad()
def scale_in_place(modules: Mapping[str, nn.Module], scalings: Sequence[ChannelScaling], *, back: bool = False) -> None:
    """Divide channels where they are made, and multiply the weights that read them, in place.

    Args:
        modules: Makers and readers by name; those that are absent are left alone.
        scalings: What to scale.
        back: Undo it instead.
    """
    for scaling in scalings:
        link, factors = scaling.link, 1 / scaling.factors if back else scaling.factors
        if link.maker in modules:
            _divide(modules[link.maker], link, factors)
        for name in link.readers:
            if name in modules:
                weight = modules[name].get_parameter("weight")
                weight.mul_(factors.to(weight))


@contextmanager
def scaled(modules: Mapping[str, nn.Module], scalings: Sequence[ChannelScaling]) -> Iterator[None]:
    """Scale channels in place while the context is open."""
    scale_in_place(modules, scalings)
    try:
        yield
    finally:
        scale_in_place(modules, scalings, back=True)


def _divide(maker: nn.Module, link: Link, factors: Tensor) -> None:
    rows = slice(link.first, link.first + len(factors))
    for _, parameter in maker.named_parameters(recurse=False):
        parameter[rows] /= factors.to(parameter).view(-1, *[1] * (parameter.dim() - 1))


@dataclass(frozen=True)
class LayerScaling:
    """What scaled channels mean for one layer: float64 factors on the CPU, `None` where nothing is scaled."""

    read: Tensor | None = None
    """By which its input channels are divided, and its weight's columns multiplied: (in,)."""
    made: tuple[int, Tensor] | None = None
    """First output channel, and by what output channels from there on are divided, with the rows of the weight."""
    heads: Tensor | None = None
    """Of a product with values: by which each head's right operand and product are divided, (heads, channels)."""

    def tensors(self) -> list[Tensor]:
        """Return all that tells this scaling from another."""
        made = [] if self.made is None else [torch.tensor([self.made[0]]), self.made[1]]
        return [*([] if self.read is None else [self.read]), *made, *([] if self.heads is None else [self.heads])]

    @torch.no_grad()
    def parameters(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the scaled weight and bias, new tensors."""
        weight = weight.detach().clone()
        bias = None if bias is None else bias.detach().clone()
        if self.made is not None:
            first, factors = self.made
            rows = slice(first, first + len(factors))
            weight[rows] /= factors.to(weight).view(-1, *[1] * (weight.dim() - 1))
            if bias is not None:
                bias[rows] /= factors.to(bias)
        if self.read is not None:
            weight *= self.read.to(weight)
        return weight, bias

    def observed(self, o: Observations) -> Observations:
        """Return what would have been observed of the layer in the scaled network, to the bit."""
        if self.heads is not None:
            return self._pairs(o, self.heads)
        inputs, weight, target, extremes = o.inputs, o.weight, o.target, o.extremes
        if self.read is not None:
            inputs = (inputs[0] / self.read.to(inputs[0]),)
            extremes = None if extremes is None else (extremes[0] / self.read.to(extremes[0]),)
        if self.made is not None:
            first, factors = self.made
            whole = torch.ones(first + len(factors), dtype=torch.float64)
            whole[first:] = factors
            weight = None if weight is None else weight * whole.square().to(weight)
            target = None if target is None else target / whole.to(target)
        return replace(o, inputs=inputs, weight=weight, target=target, extremes=extremes)

    def constant(self, value: Tensor) -> Tensor:
        """Return the start token's value (1, heads, 1, channels) as the scaled network has it."""
        return value if self.heads is None else value / self.heads.to(value)[None, :, None]

    @staticmethod
    def _pairs(o: Observations, heads: Tensor) -> Observations:
        a, b = o.inputs
        factors = heads.to(b)[o.keys % PLACES % len(heads)][:, None]  # (P, 1, channels)
        weight = None if o.weight is None else o.weight * factors.square().to(o.weight)
        target = None if o.target is None else o.target / factors.to(o.target)
        return replace(o, inputs=(a, b / factors), weight=weight, target=target)


def by_layer(scalings: Sequence[ChannelScaling]) -> dict[str, LayerScaling]:
    """Return what scaled channels mean for each layer that makes, reads or averages them."""
    found: dict[str, LayerScaling] = {}
    for scaling in scalings:
        link, factors = scaling.link, scaling.factors
        for name in link.readers:
            found[name] = replace(found.get(name, LayerScaling()), read=factors)
        if link.average:
            maker = found.get(link.maker, LayerScaling())
            found[link.maker] = replace(maker, made=(link.first, factors))
            found[link.average] = LayerScaling(heads=factors.view(link.heads, -1))
    return found
