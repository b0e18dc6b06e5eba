"""Channels divided where they are made and multiplied where they are read.

The function of the network stays the same: to the bit where the factors are powers of two, else but for rounding. So
does what was observed of it, up to these factors: it is scaled when it is looked at, and one collection serves networks
whose channels are scaled differently.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lit_clipq.calibration.batches import PLACES
from lit_clipq.calibration.channels import Link
from lit_clipq.calibration.observations import Observations
from lit_clipq.nn.layout import Layout


@dataclass(frozen=True)
class ChannelScaling:
    """One link, and what its channels are divided by."""

    link: Link
    factors: Tensor
    """Positive, float64 (channels,) on the CPU."""


@torch.no_grad()
def scale_in_place(modules: Mapping[str, nn.Module], scalings: Sequence[ChannelScaling]) -> Callable[[], None]:
    """Divide channels where they are made, and multiply the weights that read them.

    Args:
        modules: Makers and readers by name; those that are absent are left alone.
        scalings: What to scale. Channels that nobody can divide where they are made (`Link.at_reader`) are divided by a
            hook in front of the reader.

    Returns:
        What puts the values back that were there before, to the bit.
    """
    undo: list[Callable[[], None]] = []
    try:
        for scaling in scalings:
            link, factors = scaling.link, scaling.factors
            if link.maker in modules and not link.at_reader:
                for _, parameter in modules[link.maker].named_parameters(recurse=False):
                    undo.append(_put(parameter, divided(parameter.data, link.first, factors)))
            for name in (name for name in link.readers if name in modules):
                weight = modules[name].get_parameter("weight")
                undo.append(_put(weight, multiplied(weight.data, factors)))
                if link.at_reader:
                    undo.append(modules[name].register_forward_pre_hook(_division(factors)).remove)
    except BaseException:
        _all(reversed(undo))
        raise
    return lambda: _all(reversed(undo))


@contextmanager
def scaled(modules: Mapping[str, nn.Module], scalings: Sequence[ChannelScaling]) -> Iterator[None]:
    """Scale channels in place while the context is open."""
    undo = scale_in_place(modules, scalings)
    try:
        yield
    finally:
        undo()


def divided(x: Tensor, first: int, factors: Tensor) -> Tensor:
    """Return `x` (channels, *) with its rows from `first` on divided by the factors; computed in float64."""
    result, rows = x.clone(), slice(first, first + len(factors))
    shape = (-1, *[1] * (x.dim() - 1))
    result[rows] = (x[rows].double() / factors.to(x.device).view(shape)).to(x.dtype)
    return result


def multiplied(weight: Tensor, factors: Tensor) -> Tensor:
    """Return a weight (out, in, *) with its columns multiplied by the factors; computed in float64."""
    shape = (1, -1, *[1] * (weight.dim() - 2))
    return (weight.double() * factors.to(weight.device).view(shape)).to(weight.dtype)


def _put(parameter: nn.Parameter, value: Tensor) -> Callable[[], None]:
    """Give a parameter another value, and return what puts the old one back."""
    old, parameter.data = parameter.data, value

    def back() -> None:
        parameter.data = old

    return back


def _all(functions: Iterator[Callable[[], None]]) -> None:
    for function in functions:
        function()


def _division(factors: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0] / factors.to(inputs[0]), *inputs[1:])

    return hook


@dataclass(frozen=True)
class LayerScaling:
    """What scaled channels mean for one layer: float64 factors on the CPU, `None` where nothing is scaled."""

    read: Tensor | None = None
    """By which its input channels are divided, and its weight's columns multiplied: (in,)."""
    made: tuple[int, Tensor] | None = None
    """First output channel, and by what output channels from there on are divided, with the rows of the weight."""
    heads: Tensor | None = None
    """Of a product with values: by which each head's right operand and product are divided, (heads, channels)."""
    divides: Tensor | None = None
    """By which the layer itself divides its input, as nobody can do it earlier: (in,); a part of `read`."""

    def tensors(self) -> list[Tensor]:
        """Return all that tells this scaling from another."""
        made = [] if self.made is None else [torch.tensor([self.made[0]]), self.made[1]]
        return [*made, *(x for x in (self.read, self.heads, self.divides) if x is not None)]

    @torch.no_grad()
    def parameters(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the scaled weight and bias, new tensors."""
        weight, bias = weight.detach(), None if bias is None else bias.detach()
        if self.made is not None:
            weight, bias = divided(weight, *self.made), None if bias is None else divided(bias, *self.made)
        if self.read is not None:
            weight = multiplied(weight, self.read)
        return weight.clone(), None if bias is None else bias.clone()

    def observed(self, o: Observations) -> Observations:
        """Return what would have been observed of the layer in the scaled network; to the bit for powers of two."""
        if self.heads is not None:
            return self._pairs(o, self.heads)
        inputs, weight, target, extremes = o.inputs, o.weight, o.target, o.extremes
        if self.read is not None:
            inputs = (inputs[0] / _along_channels(self.read, inputs[0], o.layout),)
            extremes = None if extremes is None else (extremes[0] / self.read.to(extremes[0]),)
        if self.made is not None:
            first, factors = self.made
            axis = o.layout.channel_axis
            channels = next((x.shape[axis] for x in (weight, target) if x is not None), first + len(factors))
            whole = torch.ones(channels, dtype=torch.float64)
            whole[first : first + len(factors)] = factors
            weight = None if weight is None else weight * _along_channels(whole.square(), weight, o.layout)
            target = None if target is None else target / _along_channels(whole, target, o.layout)
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


def _along_channels(factors: Tensor, x: Tensor, layout: Layout) -> Tensor:
    """Return the factors in the shape that meets the channels of `x`, cut by `layout`."""
    shape = [1] * x.dim()
    shape[layout.channel_axis] = -1
    return factors.to(x).view(shape)


def by_layer(scalings: Sequence[ChannelScaling]) -> dict[str, LayerScaling]:
    """Return what scaled channels mean for each layer that makes, reads or averages them."""
    found: dict[str, LayerScaling] = {}
    for scaling in scalings:
        link, factors = scaling.link, scaling.factors
        for name in link.readers:
            known = found.get(name, LayerScaling())
            found[name] = replace(known, read=_times(known.read, factors))
            if link.at_reader:
                found[name] = replace(found[name], divides=_times(known.divides, factors))
        if not link.at_reader:
            maker = found.get(link.maker, LayerScaling())
            made = None if maker.made is None else maker.made[1]
            found[link.maker] = replace(maker, made=(link.first, _times(made, factors)))
        if link.average:
            found[link.average] = LayerScaling(heads=factors.view(link.heads, -1))
    return found


def _times(known: Tensor | None, factors: Tensor) -> Tensor:
    return factors if known is None else known * factors
