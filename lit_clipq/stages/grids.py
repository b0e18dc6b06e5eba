"""Which grid each operand gets."""

from dataclasses import dataclass
from typing import Literal

from lit_clipq.calibration.needs import Need, Write
from lit_clipq.functional.granularity import PerChannel, PerTensor
from lit_clipq.nn.quantizer import LogQuantizer, Quantizer, TwinGeluQuantizer, TwinSoftmaxQuantizer, UniformQuantizer
from lit_clipq.nn.swap import FLOAT_BITS, Layer, MapEntry
from lit_clipq.stages.draft import Draft
from lit_clipq.stages.stage import GridStage, Report, stage


@stage("grids")
@dataclass(frozen=True)
class Grids(GridStage):
    """Put a Q-module in the place of every layer that the plan quantizes, with a grid for each of its operands.

    Weights have symmetric grids, activations affine ones, a scale for the whole tensor. What stands in front of a
    layer is found by running it: after a softmax, and behind activations with a negative minimum, other grids may
    serve better.
    """

    needs = frozenset({Need.SOURCES})
    writes = frozenset({Write.GRIDS})

    softmax: Literal["twin", "uniform", "log2", "log_sqrt2"] = "uniform"
    """Grid of attention weights."""
    gelu: Literal["twin", "uniform"] = "uniform"
    """Grid behind GELU-like activations."""
    per_channel: bool = True
    """Whether each output channel of a weight has its own scale; else one scale a projection (q, k and v apart)."""
    restricted: bool = False
    """Whether weight grids represent the largest magnitude exactly, S = max / (2^(b-1) - 1), instead of clipping it
    by half a step, S = 2 max / (2^b - 1)."""

    def assign(self, draft: Draft) -> Report:
        """Build the Q-modules; the report counts grids by kind."""
        counts: dict[str, int] = {}
        for entry in draft.plan.quantized:
            layer = draft.session.layer[entry.name]
            quantizers = self.quantizers(layer, entry, draft)
            draft.add(entry.name, layer.kind.quantized_type(layer.module, *quantizers))
            for quantizer in quantizers:
                kind = "float" if quantizer is None else type(quantizer).__name__
                counts[kind] = counts.get(kind, 0) + 1
        return counts

    def quantizers(self, layer: Layer, entry: MapEntry, draft: Draft) -> list[Quantizer | None]:
        """Return the grids of a layer in the order in which its Q-module takes them: weight, then operands."""
        found: list[Quantizer | None] = []
        if layer.kind.has_weight:
            found.append(self._weight(entry.weight_bits or FLOAT_BITS, table=layer.kind.is_table))
        for place in range(layer.kind.operands):
            found.append(self._operand(layer, place, entry.activation_bits, draft))
        return found

    def _weight(self, bits: int, *, table: bool) -> Quantizer | None:
        if bits == FLOAT_BITS and not table:
            return None
        granularity = PerChannel(0) if self.per_channel or table else PerTensor()
        return UniformQuantizer(bits, symmetric=True, granularity=granularity, restricted=self.restricted)

    def _operand(self, layer: Layer, place: int, bits: int, draft: Draft) -> Quantizer | None:
        if bits == FLOAT_BITS:
            return None
        sources = draft.session.sources
        if place == 0 and layer.name in sources.averages and self.softmax != "uniform":
            if self.softmax == "twin":
                return TwinSoftmaxQuantizer(bits)
            return LogQuantizer(bits, steps_per_octave=1 if self.softmax == "log2" else 2)
        if place == 0 and self.gelu == "twin" and layer.kind.has_weight and layer.name in sources.minima:
            return TwinGeluQuantizer(bits, sources.minima[layer.name])
        return UniformQuantizer(bits, symmetric=False)
