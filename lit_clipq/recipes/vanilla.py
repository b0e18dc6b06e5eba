"""Vanilla min-max quantization: the baseline every method is compared with."""

from dataclasses import dataclass

import torch

from lit_clipq.calibration.collect import Rows
from lit_clipq.calibration.engine import Calibration
from lit_clipq.calibration.ranges import collect_ranges
from lit_clipq.functional.granularity import PerChannel, PerTensor, extrema
from lit_clipq.nn.modules import QModule, QWeighted
from lit_clipq.nn.quantizer import UniformQuantizer
from lit_clipq.nn.swap import FLOAT_BITS, Layer, MapEntry
from lit_clipq.recipes.base import Recipe, register
from lit_clipq.recipes.text import measuring_texts


@dataclass(frozen=True)
class Vanilla(Recipe):
    """Ranges are the minimum and maximum over the calibration set.

    Positions behind a text's end token are left out where they cannot reach the output.

    Weights: symmetric, a scale for each output channel. Activations: affine, one scale a tensor. Linear and
    convolution layers of both towers; attention products only when asked for.
    """

    attention_products: bool = False
    """Whether QK^T and attention x V are quantized as well."""
    per_channel: bool = True
    """Whether each output channel of a weight has its own scale."""
    restricted: bool = False
    """Whether weight grids represent the largest magnitude exactly, S = max / (2^(b-1) - 1), instead of clipping it
    by half a step, S = 2 max / (2^b - 1)."""


@register("vanilla", Vanilla)
def apply(recipe: Vanilla, calibration: Calibration) -> None:
    """Swap, observe ranges in one pass, freeze."""
    modules = calibration.swap(lambda layer, entry: _build(recipe, layer, entry))
    rows = Rows(torch.zeros(0, dtype=torch.int64))
    with measuring_texts(calibration, lambda: rows):
        ranges = collect_ranges(modules, calibration, rows)
    for name, module in modules.items():
        for operand, quantizer in module.operand_quantizers.items():
            if isinstance(quantizer, UniformQuantizer):
                quantizer.set_range(*ranges[name, operand])
        if isinstance(module, QWeighted) and isinstance(module.weight_quantizer, UniformQuantizer):
            module.weight_quantizer.set_range(*extrema(module.weight.detach(), module.weight_quantizer.granularity))
        module.freeze()


def _build(recipe: Vanilla, layer: Layer, entry: MapEntry) -> QModule:
    activation = entry.activation_bits

    def operand() -> UniformQuantizer | None:
        return None if activation == FLOAT_BITS else UniformQuantizer(activation, symmetric=False)

    operands = [operand() for _ in range(layer.kind.operands)]
    if entry.weight_bits is None:
        return layer.kind.quantized_type(layer.module, *operands)
    weight = None
    if entry.weight_bits != FLOAT_BITS:
        granularity = PerChannel(0) if recipe.per_channel else PerTensor()
        weight = UniformQuantizer(
            entry.weight_bits, symmetric=True, granularity=granularity, restricted=recipe.restricted
        )
    return layer.kind.quantized_type(layer.module, weight, *operands)
