"""The squared error of a layer's product on a sample of calibration rows, were its channels scaled."""

import torch
from torch import Tensor

from lit_clipq.calibration.batches import hashed
from lit_clipq.calibration.links import SeenLinks
from lit_clipq.calibration.scaling import multiplied
from lit_clipq.functional.granularity import PerTensor, at_run_time, extrema
from lit_clipq.nn.layout import Layout
from lit_clipq.nn.modules import QWeighted
from lit_clipq.nn.quantizer import Quantizer, UniformQuantizer
from lit_clipq.nn.swap import MapEntry
from lit_clipq.stages.draft import Draft
from lit_clipq.stages.grids import Grids

_HELD_OUT = 4  # every fourth unit, by its hash


class ReaderError:
    """Mean squared error of a layer's product over rows, by what its input channels are divided by.

    Grids are of the kind and width that the recipe gives them, with min-max ranges: of the input over the whole
    calibration set, of the weight as it is scaled.

    Args:
        draft: Where the layer's float weight is taken from.
        entry: What is to become of the layer.
        seen: Its channels, and a sample of what it reads.
        held_out: Whether the quarter of the sample is looked at that is held out, or the rest.
    """

    def __init__(self, draft: Draft, entry: MapEntry, seen: SeenLinks, *, held_out: bool) -> None:
        layer = draft.session.layer[entry.name]
        sample, self.seen = seen.samples[entry.name], seen.channels[entry.name]
        chosen = (hashed(sample.keys) % _HELD_OUT == 0) == held_out
        if not bool(chosen.any()):  # too few units to hold any out
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
        if self.input_quantizer is not None:
            x = _rounded(self.input_quantizer, x, low.amin(), high.amax())
        if self.weight_quantizer is not None:
            weight = _rounded(self.weight_quantizer, weight)
        difference = self.module.product_with(weight, x) - self.target
        if bias is not None:
            difference = difference + along(self.layout, bias, difference)
        return float(difference.square().mean(dtype=torch.float64)) * self.target.shape[self.layout.channel_axis]


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
    if low is None or high is None or not isinstance(quantizer.granularity, PerTensor):
        low, high = extrema(x, quantizer.granularity)
    quantizer.set_range(low.float().to(x.device), high.float().to(x.device))
    return quantizer(x)
