"""What a recipe is: a named list of stages, which layers it is for, and what of the calibration set counts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, Literal

from lit_clipq.calibration.needs import Need, Write
from lit_clipq.calibration.session import Collection
from lit_clipq.errors import ConfigError
from lit_clipq.nn.swap import FLOAT_BITS, Layer, MapEntry, QuantizationMap, select
from lit_clipq.recipes.widths import BitWidths
from lit_clipq.stages.grids import Grids
from lit_clipq.stages.recorded import Recorded
from lit_clipq.stages.schedule import Propagate, chooser
from lit_clipq.stages.stage import Stage
from lit_clipq.stages.start_tokens import StartTokens, start_products

_MOST_DRAWS = 1000
PAPER_ONLY = "the report quantized convolutions and MLPs only"


@dataclass(frozen=True)
class Recipe:
    """A list of stages with its name, and what all of them share."""

    name: str
    """How reports and artefacts call it."""
    stages: tuple[Stage, ...]
    """What is done, in order."""
    bits: BitWidths = field(default_factory=BitWidths)
    """Widths of weights and activations, by tower and by pattern of layer names."""
    include: tuple[str, ...] = ()
    """Shell patterns of layer names to quantize; empty means all."""
    exclude: tuple[str, ...] = ()
    """Shell patterns of layer names to leave float."""
    attention_products: bool = True
    """Whether QK^T and attention x V are quantized as well."""
    embeddings: bool = True
    """Whether token embedding tables are stored as codes; they multiply nothing, but are a sixth of a CLIP."""
    coverage: Literal["all", "convolutions_and_mlps"] = "all"
    """Which layers are meant; the second is what the report of PTQ4CLIP quantized, in both towers."""
    objective: Literal["fisher", "gauss_newton"] = "gauss_newton"
    """Whose gradients weigh errors; a distance may also leave them unweighted."""
    draws: int = 1
    """How many draws the squared gradients of a sample are averaged over; each is one more backward pass."""
    temperature: float = 0.1
    """Of the image-text softmax, for the Fisher objective."""
    end_token: bool = True
    """Whether positions behind a text's end token are left out of every statistic."""
    propagate: Propagate = "none"
    """Whether a layer is fitted behind the quantized layers or blocks in front of it; by default behind float ones."""
    store_bfloat16: bool = False
    """Whether operands and gradients are stored in bfloat16."""
    token_share: float = 1.0
    """Share of the rows (tokens) of linear layers that is stored and searched; their ranges still count all of them."""
    seed: int = 0
    """Of the draws in the objective."""

    def __post_init__(self) -> None:
        if not 1 <= self.draws <= _MOST_DRAWS:
            raise ConfigError(f"draws must be at least 1 and at most {_MOST_DRAWS}, got {self.draws}")
        if not 0 <= self.seed < 2**31:
            raise ConfigError(f"seed must be at least 0 and below 2^31, got {self.seed}")
        if not 0 < self.token_share <= 1:
            raise ConfigError(f"token_share must be above 0 and at most 1, got {self.token_share}")
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"temperature must be above 0, got {self.temperature}")
        for option in ("include", "exclude"):
            if isinstance(getattr(self, option), str):
                raise ConfigError(f"{option} must be a tuple of patterns, got {getattr(self, option)!r}")
        if not all(isinstance(stage, Stage) for stage in self.stages):
            raise ConfigError(f"stages must be stages, got {self.stages!r}; `compose` makes them of names and options")
        check_order(self.stages)
        choosing = chooser(self.stages)
        if choosing is not None and self.propagate != "none":
            raise ConfigError(
                f"stage {choosing.name} fits layers at several widths on one collection, which propagate: "
                f"{self.propagate} has not; set propagate to none, or give the widths it reports to a second run"
            )

    def plan(self, layers: Sequence[Layer]) -> QuantizationMap:
        """Decide what becomes of each layer, from widths, patterns and coverage; every stage has a look at it.

        Raises:
            ConfigError: For a pattern that matches no layer, or a layer that a stage cannot serve.
        """
        left_out = select(layers, self.include, self.exclude)
        self.bits.check_patterns(layers)
        planned = QuantizationMap(tuple(self._entry(layer, left_out) for layer in layers))
        for stage in self.stages:
            stage.check(planned, layers)
        return planned

    def collection(self, plan: QuantizationMap, layers: Sequence[Layer], *, text_rule: bool) -> Collection:
        """Return what of the calibration set is collected for this recipe."""
        start = any(isinstance(stage, StartTokens) for stage in self.stages)
        return Collection(
            objective=self.objective,
            draws=self.draws,
            temperature=self.temperature,
            seed=self.seed,
            end_token=self.end_token,
            drop_start=start and bool(start_products(plan, layers, text_rule=text_rule)),
            token_share=self.token_share,
            store_bfloat16=self.store_bfloat16,
            values=next(stage for stage in self.stages if isinstance(stage, Grids)).per_channel,
        )

    def to_json(self) -> dict[str, Any]:
        """Return name, stages and options as plain values."""
        options = {name: value for name, value in asdict(self).items() if name not in ("name", "stages")}
        stages = [{stage.name: stage.options()} for stage in self.stages]
        return {"name": self.name, "stages": stages, "options": options}

    def why_float(self, layer: Layer) -> str:
        """Return why this recipe leaves a layer float, or an empty text where it quantizes it."""
        if self.coverage != "all" and layer.kind.layout(layer.module).channel_axis == -1 and ".mlp." not in layer.name:
            return self._why_float(layer) or PAPER_ONLY
        return "" if self.coverage != "all" else self._why_float(layer)

    def _why_float(self, layer: Layer) -> str:
        if layer.kind.is_product_of_activations and not self.attention_products:
            return "attention products are off in this recipe"
        if layer.kind.is_table:
            if not self.embeddings:
                return "embedding tables are off in this recipe"
            return "positions stay float" if "position" in layer.name.rpartition(".")[2] else ""
        return ""

    def _entry(self, layer: Layer, left_out: Mapping[str, str]) -> MapEntry:
        weight_bits, activation_bits = self.bits.of(layer.name)
        if layer.kind.is_table:
            activation_bits = FLOAT_BITS
        has_weight = layer.kind.has_weight
        reason = left_out.get(layer.name, "") or self.why_float(layer)
        if not reason and activation_bits == FLOAT_BITS and (weight_bits == FLOAT_BITS or not has_weight):
            reason = self.bits.why_float(layer.name, layer.tower)
        if reason:
            weight_bits = activation_bits = FLOAT_BITS
        width = weight_bits if has_weight else None
        return MapEntry(layer.name, layer.tower, layer.kind.name, width, activation_bits, reason=reason)


def check_order(stages: Sequence[Stage]) -> None:
    """Refuse lists of stages that cannot be run, by name, before any data is read.

    Raises:
        ConfigError: For an empty list, a stage named twice, scopes that decrease, not exactly one stage that assigns
            grids, grids that nobody gives scales, or a stage that another one forbids in front of it.
    """
    if any(isinstance(stage, Recorded) for stage in stages):
        return  # the record of a recipe that was run elsewhere
    names = [stage.name for stage in stages]
    listed = ", ".join(names) or "none"
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"stage {twice} is named twice in [{listed}]; name each stage once")
    for before, after in pairwise(stages):
        if after.scope < before.scope:
            raise ConfigError(
                f"stage {after.name} works on {_SCOPES[after.scope]} and must stand before {before.name}, which works "
                f"on {_SCOPES[before.scope]}; got [{listed}]"
            )
    for place, stage in enumerate(stages):
        stage.check_behind(stages[:place])
        written = {write for earlier in stages[:place] for write in earlier.writes}
        missing = sorted(write.name.lower() for write in stage.reads - written)
        if missing:
            raise ConfigError(
                f"stage {stage.name} needs {missing[0]} that a stage in front of it has written; got [{listed}]"
            )
        early = next((name for name in names[:place] if name in stage.forbids), None)
        if early is not None:
            raise ConfigError(f"stage {stage.name} must not stand behind {early}; got [{listed}]")
    reason = next((stage.hides() for stage in stages if stage.hides()), "")
    looks = next((stage.name for stage in stages if Need.OPERANDS in stage.asks()), None)
    if reason and looks:
        raise ConfigError(
            f"{reason}, which stage {looks} cannot see; leave it out, with `ranges` in the place of a search; got "
            f"[{listed}]"
        )
    assigning = [stage.name for stage in stages if Write.GRIDS in stage.writes]
    if len(assigning) != 1:
        raise ConfigError(f"expected one stage that assigns grids, such as `grids`, got {len(assigning)} in [{listed}]")
    if not any(Write.SCALES in stage.writes for stage in stages):
        raise ConfigError(f"no stage in [{listed}] gives the grids their scales; add `search` or `ranges`")


_SCOPES = ("the float network", "grids", "layers", "blocks")
