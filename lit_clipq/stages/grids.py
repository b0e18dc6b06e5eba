"""Which grid each operand gets."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lit_clipq.calibration.needs import Need, Write
from lit_clipq.errors import ConfigError
from lit_clipq.functional.granularity import Granularity, PerChannel, PerGroup, PerSample, PerTensor, PerToken
from lit_clipq.nn.adaptive_log import AdaptiveLogQuantizer
from lit_clipq.nn.layout import ROWS
from lit_clipq.nn.modules import QModule
from lit_clipq.nn.quantizer import LogQuantizer, Quantizer, TwinGeluQuantizer, TwinSoftmaxQuantizer, UniformQuantizer
from lit_clipq.nn.swap import FLOAT_BITS, Layer, MapEntry, QuantizationMap
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

    softmax: Literal["twin", "uniform", "log2", "log_sqrt2", "adalog", "best"] = "uniform"
    """Grid of attention weights; `best` lets a search choose between `twin` and `adalog`, layer by layer."""
    gelu: Literal["twin", "uniform", "adalog", "best"] = "uniform"
    """Grid behind GELU-like activations; `best` as for attention weights."""
    inputs: Literal["static", "per_token", "per_sample"] = "static"
    """Whether activations have one range from calibration, or one found at run time for each token or each sample, so
    that what else is in a batch never matters. `per_token`: rows of linear layers and of queries and columns of keys;
    values, which are summed over tokens, have a range from calibration for each channel, and the inputs of convolutions
    one for each sample. `per_sample`: one for each sample, but in the text tower, where rows behind a text's end would
    count, as `per_token`."""
    symmetric: bool = False
    """Whether uniform grids of activations mirror around 0, as those of weights do."""
    per_channel: bool = True
    """Whether each output channel of a weight has its own scale; else one scale a projection (q, k and v apart)."""
    restricted: bool = False
    """Whether weight grids represent the largest magnitude exactly, S = max / (2^(b-1) - 1), instead of clipping it
    by half a step, S = 2 max / (2^b - 1)."""
    group_size: int | None = None
    """If given, so many neighbours along the input of a linear layer's weight share a scale; it must divide the input.
    Convolutions keep a scale for each output channel."""

    def __post_init__(self) -> None:
        if self.group_size is not None and self.group_size < 1:
            raise ConfigError(f"group_size of stage grids must be at least 1, got {self.group_size}")
        if self.group_size is not None and not self.per_channel:
            raise ConfigError("group_size of stage grids divides the rows of weights; leave out per_channel: false")

    def hides(self) -> str:
        """Refuse stages that compare rows where a whole sample has one range."""
        return "inputs: per_sample of stage grids has one range for all rows of a sample" * (
            self.inputs == "per_sample"
        )

    def check(self, plan: QuantizationMap, layers: Sequence[Layer]) -> None:
        """Refuse groups that do not divide the input of a layer."""
        quantized = {entry.name for entry in plan.quantized if entry.weight_bits not in (None, FLOAT_BITS)}
        for layer in layers:
            if self.group_size is not None and layer.name in quantized and self._has_groups(layer):
                inputs = layer.module.get_parameter("weight").shape[-1]
                if inputs % self.group_size:
                    raise ConfigError(
                        f"group_size {self.group_size} does not divide the {inputs} inputs of {layer.name}; choose a "
                        "divisor, or exclude the layer"
                    )

    def assign(self, draft: Draft) -> Report:
        """Build the Q-modules; the report counts grids by kind."""
        counts: dict[str, int] = {}
        for entry in draft.plan.quantized:
            layer = draft.session.layer[entry.name]
            quantizers = self.quantizers(layer, entry, draft)
            module = layer.kind.quantized_type(layer.module, *quantizers)
            draft.add(entry.name, module)
            module.rivals = self._rivals(module)
            for quantizer in quantizers:
                kind = "float" if quantizer is None else type(quantizer).__name__
                counts[kind] = counts.get(kind, 0) + 1
        return counts

    def quantizers(self, layer: Layer, entry: MapEntry, draft: Draft) -> list[Quantizer | None]:
        """Return the grids of a layer in the order in which its Q-module takes them: weight, then operands."""
        found: list[Quantizer | None] = []
        if layer.kind.has_weight:
            found.append(self._weight(layer, entry.weight_bits or FLOAT_BITS))
        for place in range(layer.kind.operands):
            found.append(self._operand(layer, place, entry.activation_bits, draft))
        return found

    def _rivals(self, module: QModule) -> dict[str, Quantizer]:
        """Return the grids that a search may put in the place of an operand's own."""
        found: dict[str, Quantizer] = {}
        for name, quantizer in module.operand_quantizers.items():
            if isinstance(quantizer, TwinSoftmaxQuantizer) and self.softmax == "best":
                found[name] = AdaptiveLogQuantizer(quantizer.bits)
            if isinstance(quantizer, TwinGeluQuantizer) and self.gelu == "best":
                found[name] = AdaptiveLogQuantizer(quantizer.bits, quantizer.minimum)
        return found

    def _weight(self, layer: Layer, bits: int) -> Quantizer | None:
        table = layer.kind.is_table
        if bits == FLOAT_BITS and not table:
            return None
        granularity: Granularity = PerChannel(0) if self.per_channel or table else PerTensor()
        if self.group_size is not None and self._has_groups(layer):
            granularity = PerGroup(self.group_size)
        return UniformQuantizer(bits, symmetric=True, granularity=granularity, restricted=self.restricted)

    @staticmethod
    def _has_groups(layer: Layer) -> bool:
        """Whether a layer is linear: its weight has rows of inputs."""
        return layer.kind.has_weight and not layer.kind.is_table and layer.kind.layout(layer.module) is ROWS

    def _operand(self, layer: Layer, place: int, bits: int, draft: Draft) -> Quantizer | None:
        if bits == FLOAT_BITS:
            return None
        sources = draft.session.sources
        if place == 0 and layer.name in sources.averages and self.softmax != "uniform":
            if self.softmax in ("twin", "best"):
                return TwinSoftmaxQuantizer(bits)
            if self.softmax == "adalog":
                return AdaptiveLogQuantizer(bits)
            return LogQuantizer(bits, steps_per_octave=1 if self.softmax == "log2" else 2)
        if place == 0 and self.gelu != "uniform" and layer.kind.has_weight and layer.name in sources.minima:
            kind = AdaptiveLogQuantizer if self.gelu == "adalog" else TwinGeluQuantizer
            return kind(bits, sources.minima[layer.name])
        granularity = self._of_operand(layer, place, averages=layer.name in sources.averages)
        restricted = self.restricted and self.symmetric
        return UniformQuantizer(bits, symmetric=self.symmetric, granularity=granularity, restricted=restricted)

    def _of_operand(self, layer: Layer, place: int, *, averages: bool) -> Granularity:
        if self.inputs == "static":
            return PerTensor()
        if self.inputs == "per_sample" and layer.tower != "text":
            return PerSample()
        if layer.kind.is_product_of_activations:
            return PerToken() if place == 0 else PerChannel(-1) if averages else PerToken(-2)
        return PerToken() if layer.kind.layout(layer.module) is ROWS else PerSample()
