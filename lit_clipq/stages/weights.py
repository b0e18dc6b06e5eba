"""What stages have in common that fit the weights of single layers."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lit_clipq.calibration.needs import Need, Write
from lit_clipq.errors import ConfigError
from lit_clipq.functional.distance import Distance
from lit_clipq.functional.granularity import PerGroup, split_groups
from lit_clipq.functional.uniform import broadcastable
from lit_clipq.nn.modules import QWeighted
from lit_clipq.nn.quantizer import UniformQuantizer
from lit_clipq.nn.swap import Layer, QuantizationMap, check_pattern
from lit_clipq.search.data import LayerData
from lit_clipq.search.gram import as_matrix, has_rows
from lit_clipq.stages.stage import LayerStage, LayerTask
from lit_clipq.stages.trial import trial

NO_WEIGHT = "a product of activations has no weight"
TABLE = "a table multiplies nothing"


@dataclass(frozen=True)
class WeightStage(LayerStage):
    """Fits weight or bias of layers, each kept where it is no worse on samples held out (`trial`).

    Attributes:
        rounds: Whether it rounds the weight, which then must have a uniform grid and be a matrix.
        matrices: How many matrices of the size of X^T X it holds at a time.
    """

    needs = frozenset({Need.OPERANDS})
    reads = frozenset({Write.SCALES})
    tables = True
    rounds: ClassVar[bool] = True
    matrices: ClassVar[int] = 0

    layers: tuple[str, ...] = ()
    """Shell patterns of the layers it is for; empty means all that have a weight."""

    def asks(self) -> frozenset[Need]:
        """Ask for gradients only where an option `weighted` says that they weigh errors."""
        return self.needs if self.distance == "hessian" else self.needs - {Need.GRADIENTS}

    @property
    def distance(self) -> Distance:
        """How it weighs errors itself."""
        return "hessian" if getattr(self, "weighted", False) else "l2"

    def check(self, plan: QuantizationMap, layers: Sequence[Layer]) -> None:
        """Refuse patterns that match no layer, and those that match none with a weight to be fitted."""
        planned = {entry.name: entry for entry in plan.entries}
        for pattern in self.layers:
            check_pattern(f"stages {self.name}: layers:", pattern, layers)
            matched = [layer for layer in layers if fnmatchcase(layer.name, pattern)]
            reasons = {layer.name: planned[layer.name].reason or _unfit(layer) for layer in matched}
            if all(reasons.values()):
                name, reason = next(iter(reasons.items()))
                raise ConfigError(
                    f"stage {self.name} cannot fit {name}: {reason}; take {pattern!r} out of its `layers`, or name "
                    "layers with a weight"
                )

    def workspace_bytes(self, layer: Layer) -> int:
        """Return the bytes of its matrices, X^T X and the like, and of weights in float64."""
        weight = layer.module._parameters.get("weight")
        if weight is None or _unfit(layer) or not self.matrices:
            return 0
        columns, groups = weight[0].numel() + 1, int(getattr(layer.module, "groups", 1))
        return 8 * self.matrices * (groups * columns**2 + weight.numel())

    def fit(self, task: LayerTask) -> Any:
        """Fit one layer; reports its objective on what was held out, or why there was nothing to do."""
        if self.layers and not any(fnmatchcase(task.name, pattern) for pattern in self.layers):
            return None
        reason = _unfit(task.layer) or self.unfit(task)
        return {"kept": False, "reason": reason} if reason else trial(task, lambda data: self._fitted(task, data))

    def unfit(self, task: LayerTask) -> str:
        """Return why there is nothing to do for a layer with a weight, or an empty text."""
        module = task.module
        if not isinstance(module, QWeighted) or (self.rounds and not has_rows(module)):
            return f"{type(module).__name__} is no product of rows and a matrix"
        grid = module.weight_quantizer
        if self.rounds and not isinstance(grid, UniformQuantizer):
            return "the weight is float" if grid is None else f"{type(grid).__name__} is no uniform grid"
        return ""

    @torch.no_grad()
    def _fitted(self, task: LayerTask, data: LayerData) -> Mapping[str, Any] | None:
        assert isinstance(task.module, QWeighted)  # noqa: S101 - `unfit` saw to it
        return self.improve(task, task.module, data)

    @abstractmethod
    def improve(self, task: LayerTask, module: QWeighted, data: LayerData) -> Mapping[str, Any] | None:
        """Change weight, grid or bias of a layer; returns what goes into its report."""


def _unfit(layer: Layer) -> str:
    """Return why a kind of layer has no weight to fit, or an empty text."""
    return NO_WEIGHT if layer.kind.is_product_of_activations else TABLE if layer.kind.is_table else ""


def put_weight(module: QWeighted, weight: Tensor) -> None:
    """Give a layer a new weight of its shape; the one it had is the float layer's and stays as it is."""
    old = module.weight
    module.weight = nn.Parameter(weight.reshape(old.shape).to(old), requires_grad=old.requires_grad)


@dataclass(frozen=True)
class ElementGrid:
    """A uniform grid of a weight, element by element, each (G, R, d) float64."""

    scale: Tensor
    """Step."""
    low: Tensor
    """Smallest whole step, code minus zero point."""
    high: Tensor
    """Largest whole step."""

    @staticmethod
    def of(module: QWeighted) -> "ElementGrid":
        """Return the grid of a layer's weight, whose quantizer is uniform and has its scale."""
        grid = module.weight_quantizer
        assert isinstance(grid, UniformQuantizer)  # noqa: S101 - `unfit` saw to it
        weight, by = module.weight.detach(), grid.granularity
        scale, zero = grid._need("scale"), grid._need("zero_point")

        def spread(values: Tensor) -> Tensor:
            like = split_groups(weight, by.size) if isinstance(by, PerGroup) else weight
            whole = broadcastable(values, weight, by).expand(like.shape).reshape(weight.shape)
            return as_matrix(module, whole).double()

        zero_steps = spread(zero)
        return ElementGrid(spread(scale), grid.qmin - zero_steps, grid.qmax - zero_steps)

    def nearest(self, weight: Tensor) -> Tensor:
        """Return the whole steps nearest to a weight (G, R, d)."""
        return (weight / self.scale).round_().clamp_(self.low, self.high)

    def values(self, steps: Tensor) -> Tensor:
        """Return the weight (G, R, d) of whole steps, float32: to the bit what rounding it again gives."""
        return steps.float() * self.scale.float()

    def permuted(self, order: Tensor) -> "ElementGrid":
        """Return the grid with its columns in another order (G, d)."""
        return ElementGrid(*(in_order(x, order) for x in (self.scale, self.low, self.high)))


def in_order(x: Tensor, order: Tensor) -> Tensor:
    """Return (G, R, d) with the columns of each group in the order (G, d)."""
    return x.gather(-1, order[:, None].expand_as(x))


def both_in_order(x: Tensor, order: Tensor) -> Tensor:
    """Return square matrices (G, d, d) with rows and columns in the order (G, d)."""
    return in_order(in_order(x, order).mT, order).mT


def falling(hessian: Tensor) -> Tensor:
    """Return the order of columns by falling diagonal of H (G, d, d), int64 (G, d)."""
    return hessian.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)
