"""Mixed precision: bits layer by layer under a budget of size or of bit operations."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lit_clipq.calibration.needs import Need, Write
from lit_clipq.errors import ConfigError
from lit_clipq.nn.swap import FLOAT_BITS, Layer, MapEntry, QuantizationMap
from lit_clipq.nn.widths import read_widths, written
from lit_clipq.search.allocation import allocate
from lit_clipq.search.rounded import rounded_error
from lit_clipq.stages.draft import Draft
from lit_clipq.stages.search import Search
from lit_clipq.stages.stage import ChoosingStage, LayerTask, Report, stage

_UNITS = {"size": "bits of weights", "bops": "bit operations a sample"}


@stage("allocate")
@dataclass(frozen=True)
class Allocate(ChoosingStage):
    """Give each layer the widths with which the network does best within a budget.

    Every layer is fitted at all widths on the same observations, by the stages in front of this one, and what it costs
    is its objective as they leave it: `sum g^2 (O^ - O)^2`, g the gradient of the recipe's objective by the product.
    Then `min sum_l c_l(w_l)` with `sum_l size_l(w_l) <= budget` is solved (HAWQ-V3, arXiv 2011.10680, with another
    cost), and each layer keeps the grids it was given at its width. The recipe's own widths are among the choices, so
    that the sum of objectives is never worse than with them. Tables of embeddings keep their width.
    """

    needs = frozenset({Need.OPERANDS, Need.GRADIENTS})
    reads = frozenset({Write.SCALES})

    budget: Literal["size", "bops"] = "size"
    """What is bounded: bits of all weights, or bit operations, the multiply-accumulates of a sample times the widths of
    both operands (a float one counts as 32)."""
    bits: float | None = None
    """The budget is what so many bits everywhere would take; by default what the recipe's own widths take."""
    widths: tuple[int | str, ...] = ("w2", "w3", "w4", "w6", "w8")
    """Widths to choose from, beside the recipe's own: numbers for both operands, or such as `w4a8`, `w4`, `a8`. An
    operand that the recipe leaves float stays float."""

    def __post_init__(self) -> None:
        if not self.widths:
            raise ConfigError("widths of stage allocate must name some to choose from, such as [w2, w4, w8], got none")
        if self.bits is not None and not 0 < self.bits <= FLOAT_BITS:
            raise ConfigError(f"bits of stage allocate must be above 0 and at most {FLOAT_BITS}, got {self.bits}")
        for width in self.widths:
            if FLOAT_BITS in read_widths("widths of stage allocate", width):
                raise ConfigError(f"widths of stage allocate must be 2 to 16 bits, got {width!r}")

    def check(self, plan: QuantizationMap, layers: Sequence[Layer]) -> None:
        """Refuse a budget of size that no choice meets; bit operations are known once a batch ran."""
        if self.budget == "size":
            self._budget(plan.quantized, _weights(layers))

    def plans(self, draft: Draft) -> list[QuantizationMap]:
        """Return the plan of a draft, and one for each of the widths.

        Raises:
            ConfigError: If the budget is below what the smallest widths take; says how much that is.
        """
        self._budget(_entries(draft), _weights(draft.session.layers))
        return [draft.plan, *(self._with(draft.plan, width) for width in self.widths)]

    def fit(self, task: LayerTask) -> Any:
        """Measure what a layer costs as it is now."""
        search = next((stage for stage in task.draft.stages if isinstance(stage, Search)), None)
        factored = search is None or search.factored
        return rounded_error(task.module, task.data, "hessian", factor=factored)[0]

    def choose(self, draft: Draft, offers: Sequence[Mapping[str, LayerTask]]) -> tuple[dict[str, int], Report]:
        """Choose the offer of each layer; the report has widths and costs by layer, and how near the best it is."""
        entries = [entry for entry in _entries(draft) if entry.name in offers[0]]
        elements = _weights(draft.session.layers)
        sizes = [self._sizes(entry, elements) for entry in entries]
        costs = [[float(offer[entry.name].report[self.name]) for offer in offers] for entry in entries]
        budget = self._budget(entries, elements)
        found = allocate(costs, sizes, budget)
        options = [self._options(entry) for entry in entries]
        report: dict[str, Any] = {
            "budget": budget,
            "taken": found.size,
            "of": _UNITS[self.budget],
            "cost": found.cost,
            "cost of the recipe's widths": sum(cost[0] for cost in costs),
            "no choice costs less than": found.bound,
            "widths": {e.name: written(*o[x]) for e, o, x in zip(entries, options, found.choice, strict=True)},
            "costs": {
                e.name: {written(*width): cost for width, cost in zip(o, c, strict=True)}
                for e, o, c in zip(entries, options, costs, strict=True)
            },
        }
        return {entry.name: x for entry, x in zip(entries, found.choice, strict=True)}, report

    def _options(self, entry: MapEntry) -> list[tuple[int | None, int]]:
        """Return the widths of a layer to choose from, its own first."""
        found = [(entry.weight_bits, entry.activation_bits)]
        for width in self.widths:
            weight, activation = read_widths("widths of stage allocate", width)
            keeps = entry.weight_bits in (None, FLOAT_BITS) or weight is None
            stays = entry.activation_bits == FLOAT_BITS or activation is None
            own = entry.activation_bits if stays or activation is None else activation
            found.append((entry.weight_bits if keeps else weight, own))
        return found

    def _with(self, plan: QuantizationMap, width: int | str) -> QuantizationMap:
        place = 1 + self.widths.index(width)
        return QuantizationMap(
            tuple(
                replace(e, weight_bits=self._options(e)[place][0], activation_bits=self._options(e)[place][1])
                if e.quantized
                else e
                for e in plan.entries
            )
        )

    def _sizes(self, entry: MapEntry, elements: Mapping[str, int]) -> list[int]:
        """Return what each offer of a layer takes of the budget."""
        if self.budget == "size":
            return [elements.get(entry.name, 0) * (weight or 0) for weight, _ in self._options(entry)]
        return [round(entry.macs) * (a if w is None else w) * a for w, a in self._options(entry)]

    def _budget(self, entries: Sequence[MapEntry], elements: Mapping[str, int]) -> int:
        """Return the budget of the layers that are to share it.

        Raises:
            ConfigError: If it is below what their smallest widths take.
        """
        chosen = [entry for entry in entries if self.budget == "bops" or entry.name in elements]
        sizes = [self._sizes(entry, elements) for entry in chosen]
        if self.bits is None:
            return sum(offers[0] for offers in sizes)
        bits = float(self.bits)
        if self.budget == "size":
            whole = sum(elements[e.name] for e in chosen)
            budget, least = whole * bits, sum(map(min, sizes)) / max(whole, 1)
        else:
            whole = sum(round(e.macs) for e in chosen)
            budget, least = whole * bits**2, math.sqrt(sum(map(min, sizes)) / max(whole, 1))
        if sum(map(min, sizes)) > budget:
            raise ConfigError(
                f"the budget of stage allocate is {bits:g} bits, but the smallest of its widths take "
                f"{math.ceil(1000 * least) / 1000:g} on average; raise bits, or add smaller widths"
            )
        return int(budget)


def _entries(draft: Draft) -> list[MapEntry]:
    """Return the layers of a draft whose widths are chosen."""
    names = set(draft.session.searched(draft.plan))
    return [entry for entry in draft.plan.quantized if entry.name in names]


def _weights(layers: Sequence[Layer]) -> dict[str, int]:
    """Return how many elements the weight of each product has; tables are left out."""
    return {
        layer.name: layer.module.get_parameter("weight").numel()
        for layer in layers
        if layer.kind.has_weight and not layer.kind.is_table
    }
