"""What a stage is: a frozen dataclass of options that says what it needs and writes, and the method that does it."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from torch import nn

from lit_clipq.calibration.needs import Need, Write
from lit_clipq.calibration.ranges import Ranges
from lit_clipq.calibration.results import LayerResult
from lit_clipq.errors import ConfigError
from lit_clipq.functional.distance import Distance
from lit_clipq.nn.modules import QModule
from lit_clipq.nn.swap import Layer, QuantizationMap
from lit_clipq.search.data import LayerData

if TYPE_CHECKING:
    from lit_clipq.stages.draft import Draft

Report = Mapping[str, Any]
"""What a stage says of itself: plain values, by the name of what they speak of."""


class Scope(IntEnum):
    """On what a stage works. In a recipe scopes never decrease."""

    FLOAT = 0
    """The float network, before anything is quantized."""
    GRIDS = 1
    """Which operand gets which grid."""
    LAYER = 2
    """One layer after the other, all on the same observations."""
    BLOCK = 3
    """One block after the other, behind the quantized blocks in front of it."""


class Stage(ABC):
    """A step of a recipe. Subclasses are frozen dataclasses, registered by `stage`.

    Attributes:
        name: What recipes, YAML and reports call it.
        scope: On what it works.
        needs: What of the calibration set it looks at; `asks` may narrow that by options.
        writes: What it changes.
        reads: What stages in front of it must have written.
        forbids: Names of stages that must not stand in front of it.
        passes: How often it runs the calibration set by itself.
    """

    name: ClassVar[str]
    scope: ClassVar[Scope]
    needs: ClassVar[frozenset[Need]] = frozenset()
    writes: ClassVar[frozenset[Write]] = frozenset()
    reads: ClassVar[frozenset[Write]] = frozenset()
    forbids: ClassVar[frozenset[str]] = frozenset()
    passes: ClassVar[int] = 0

    def asks(self) -> frozenset[Need]:
        """Return what of `needs` it looks at with these options."""
        return self.needs

    def options(self) -> dict[str, Any]:
        """Return its options as plain values."""
        return asdict(self)  # type: ignore[call-overload, no-any-return]

    def hides(self) -> str:
        """Say why what single layers saw does not tell what they will compute; empty where it does.

        Stages that look at operands are then refused.
        """
        return ""

    def check_behind(self, before: "Sequence[Stage]") -> None:  # noqa: B027 - most stages take any
        """Refuse options of the stages in front of it that it cannot work with.

        Raises:
            ConfigError: Names stage and option.
        """

    def check(self, plan: QuantizationMap, layers: Sequence[Layer]) -> None:  # noqa: B027 - most stages take any plan
        """Refuse a plan that it cannot serve, by layer name, before any data is read.

        Args:
            plan: What is to become of each layer.
            layers: The quantizable layers; their modules may be on the meta device.

        Raises:
            ConfigError: Names the layer, why, and what to change.
        """

    def check_networks(self, plan: QuantizationMap, roots: Mapping[str, nn.Module]) -> None:  # noqa: B027
        """Refuse networks that it cannot serve as its options have it, by name, before any data is read.

        Args:
            plan: What is to become of each layer.
            roots: Named networks with explicit attentions; they may be on the meta device.

        Raises:
            ConfigError: Names the module, why, and what to change.
        """


class FloatStage(Stage):
    """Rewrites the float network, whose function stays the same within a written tolerance.

    Attributes:
        in_place: Whether it changes modules by `Draft.change`; one that only scales channels (`Draft.scale`) does not,
            and what was seen of the network goes on to hold.
    """

    scope = Scope.FLOAT
    in_place: ClassVar[bool] = True

    @abstractmethod
    def rewrite(self, draft: "Draft") -> Report:
        """Rewrite the network of a draft and say what was done."""


class GridStage(Stage):
    """Decides about the layers of a draft before anything is fitted."""

    scope = Scope.GRIDS

    @abstractmethod
    def assign(self, draft: "Draft") -> Report:
        """Fill or change `draft.modules` and say what was done."""


@dataclass
class LayerTask:
    """One layer of a draft while it is visited.

    Attributes:
        layer: The float layer.
        module: The Q-module in its float phase; the stages before may have given its grids their scales.
        draft: What it belongs to.
        observed: What the layer saw, where a stage asked for operands; a table sees nothing.
        ranges: Minima and maxima of operands, where a stage asked for them.
        result: How a search went, if there was one.
        report: What stages say of this layer, by stage.
        structure: What stages add to the layer; see `lit_clipq.nn.structure`.
    """

    layer: Layer
    module: QModule
    draft: "Draft"
    observed: LayerData | None = None
    ranges: Ranges = field(default_factory=dict)
    result: LayerResult | None = None
    report: dict[str, Any] = field(default_factory=dict)
    structure: list[dict[str, Any]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The layer's name."""
        return self.layer.name

    @property
    def distance(self) -> Distance:
        """How the recipe weighs errors: `hessian` where one of its stages asks for gradients, else `l2`."""
        return "hessian" if any(Need.GRADIENTS in stage.asks() for stage in self.draft.stages) else "l2"

    @property
    def data(self) -> LayerData:
        """What the layer saw.

        Raises:
            ConfigError: If no stage before the visit asked for operands.
        """
        if self.observed is None:
            raise ConfigError(
                f"a stage looks at what {self.name} saw without asking for it; add Need.OPERANDS to its `needs`"
            )
        return self.observed


class LayerStage(Stage):
    """Works on one layer at a time, all such stages of a recipe on the same observations.

    Attributes:
        tables: Whether it also takes tables of embeddings, which see nothing: their task has no data.
    """

    scope = Scope.LAYER
    tables: ClassVar[bool] = False

    def workspace_bytes(self, layer: Layer) -> int:  # noqa: ARG002 - most need none
        """Return the bytes that fitting a layer takes besides copies of what it saw."""
        return 0

    @abstractmethod
    def fit(self, task: LayerTask) -> Any:
        """Fit one layer; what is returned goes into the report under the layer's name, `None` is left out."""


class ChoosingStage(LayerStage):
    """Has every layer fitted in several ways on the same observations, and chooses when all of them are.

    `fit` tells what a layer costs as the stages in front leave it; stages behind work on each of the ways as well.
    """

    @abstractmethod
    def plans(self, draft: "Draft") -> list[QuantizationMap]:
        """Return the plans by which layers are fitted; they differ in widths only.

        Args:
            draft: Prepared, with the recipe's own plan.
        """

    @abstractmethod
    def choose(self, draft: "Draft", offers: Sequence[Mapping[str, LayerTask]]) -> tuple[dict[str, int], Report]:
        """Choose for each layer.

        Args:
            draft: The draft of the recipe.
            offers: For each of the plans the layers as they were fitted.

        Returns:
            Number of a plan by layer, and what the stage says of itself.
        """


S = TypeVar("S", bound=type[Stage])
STAGES: dict[str, type[Stage]] = {}
"""Every stage by its name."""


def stage(name: str) -> Callable[[S], S]:
    """Register a stage under the name that recipes and YAML use.

    Raises:
        ValueError: If another class has that name.
    """

    def add(kind: S) -> S:
        taken = STAGES.get(name)
        if taken is not None and (taken.__module__, taken.__qualname__) != (kind.__module__, kind.__qualname__):
            raise ValueError(f"expected a new name for a stage, but {name!r} is {taken.__module__}.{taken.__name__}")
        kind.name = name
        STAGES[name] = kind
        return kind

    return add


def finite(value: float) -> float | None:
    """Return a number for a report; `None` where it is not finite, which JSON cannot hold."""
    return value if math.isfinite(value) else None
