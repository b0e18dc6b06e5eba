"""The squared error of a layer's product on a sample of calibration rows, were its channels scaled."""

import torch
from torch import Tensor

from lit_clipq.calibration.batches import sample_of
from lit_clipq.calibration.links import SeenLinks
from lit_clipq.calibration.needs import Need
from lit_clipq.calibration.scaling import multiplied
from lit_clipq.functional.granularity import PerTensor, at_run_time, extrema
from lit_clipq.nn.layout import Layout
from lit_clipq.nn.modules import QWeighted
from lit_clipq.nn.quantizer import Quantizer, UniformQuantizer
from lit_clipq.nn.swap import MapEntry
from lit_clipq.search.data import held_out as samples_held_out
from lit_clipq.stages.draft import Draft
from lit_clipq.stages.grids import Grids

_SHARES = (1.0, 0.85, 0.7, 0.55, 0.4)  # of a range


class ReaderError:
    """Mean squared error of a layer's product over rows, by what its input channels are divided by.

    Grids are of the kind and width that the recipe gives them. Their ranges are minimum and maximum, of the input over
    the whole calibration set, of the weight as it is scaled; where a stage of the recipe searches scales, the best of
    some shares of that, by the product with the other operand in float.

    Args:
        draft: Where the layer's float weight is taken from.
        entry: What is to become of the layer.
        seen: Its channels, and a sample of what it reads.
        held_out: Whether the rows of calibration samples that are held out are looked at, every fourth, or the rest.
    """

    def __init__(self, draft: Draft, entry: MapEntry, seen: SeenLinks, *, held_out: bool) -> None:
        layer = draft.session.layer[entry.name]
        sample, self.seen = seen.samples[entry.name], seen.channels[entry.name]
        chosen = samples_held_out(sample_of(sample.keys)) == held_out
        if not bool(chosen.any()):  # too few samples to hold any out
            chosen = torch.ones_like(chosen)
        device = draft.session.device
        self.x = sample.units[chosen].to(device)  # (N, in) or (N, C, H, W)
        self.weight = draft.parameters(entry.name)[0]
        quantizers = draft.stage(Grids).quantizers(layer, entry, draft)
        module = layer.kind.quantized_type(layer.module, *quantizers)
        assert isinstance(module, QWeighted)  # noqa: S101 - links are read by layers with weights
        self.module, self.layout = module, layer.kind.layout(layer.module)
        self.weight_quantizer, self.input_quantizer = quantizers
        self.target = module.product_with(self.weight, self.x)
        self.shares = _SHARES if any(Need.OPERANDS in stage.asks() for stage in draft.stages) else _SHARES[:1]

    def __call__(self, factors: Tensor, shift: Tensor | None = None) -> float:
        """Return the error if the layer reads `x / factors - shift`, with what that takes from it in its float bias.

        Args:
            factors: Positive, float64 (channels,) on the CPU.
            shift: float64 (channels,) on the CPU; `None` is 0.
        """
        weight, x = multiplied(self.weight, factors), self.x / along(self.layout, factors, self.x)
        low, high, bias = self.seen.low / factors, self.seen.high / factors, None
        if shift is not None:
            x, low, high = x - along(self.layout, shift, x), low - shift, high - shift
            bias = weight.double().flatten(1) @ shift.to(weight.device)
        rounded = weight
        if self.weight_quantizer is not None:
            rounded = self._rounded_weight(self.weight_quantizer, weight, x)
        if self.input_quantizer is None:
            return self._error(rounded, x, bias)
        low, high = low.amin(), high.amax()
        inputs = [_rounded(self.input_quantizer, x, low * share, high * share) for share in self.shares]
        if len(inputs) > 1:
            inputs = [min(inputs, key=lambda rounded_x: self._error(weight, rounded_x, bias))]
        return self._error(rounded, inputs[0], bias)

    def _error(self, weight: Tensor, x: Tensor, bias: Tensor | None) -> float:
        difference = self.module.product_with(weight, x).sub_(self.target)
        if bias is not None:
            difference += along(self.layout, bias, difference)
        return float(difference.square_().mean(dtype=torch.float64)) * self.target.shape[self.layout.channel_axis]

    def _rounded_weight(self, quantizer: Quantizer, weight: Tensor, x: Tensor) -> Tensor:
        """Round a weight (out, in, *), each row by the share of its range that costs its product least."""
        low, high = extrema(weight, quantizer.granularity) if isinstance(quantizer, UniformQuantizer) else (None, None)
        if low is None or high is None or len(self.shares) == 1:
            return _rounded(quantizer, weight)
        power = x.square().movedim(self.layout.channel_axis, -1).flatten(0, -2).mean(0)
        power = power.view(1, -1, *[1] * (weight.dim() - 2))
        offers = torch.stack([_rounded(quantizer, weight, low * share, high * share) for share in self.shares])
        errors = ((offers - weight).square() * power).flatten(2).sum(2)  # (shares, out)
        return offers[errors.argmin(0), torch.arange(len(weight), device=weight.device)]


def along(layout: Layout, values: Tensor, x: Tensor) -> Tensor:
    """Return values (channels,) in the shape and type that meets the channels of `x`, cut by `layout`."""
    shape = [1] * x.dim()
    shape[layout.channel_axis] = -1
    return values.to(x).view(shape)


def _rounded(quantizer: Quantizer, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    """Round by a min-max grid; kinds of grids that min and max do not decide are stood for by an affine one."""
    if not isinstance(quantizer, UniformQuantizer):
        quantizer = UniformQuantizer(quantizer.bits, symmetric=False)
    if at_run_time(quantizer.granularity):
        return quantizer(x)
    if low is None or high is None or (low.dim() == 0 and not isinstance(quantizer.granularity, PerTensor)):
        low, high = extrema(x, quantizer.granularity)
    quantizer.set_range(low.float().to(x.device), high.float().to(x.device))
    return quantizer(x)
