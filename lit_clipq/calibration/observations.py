"""What one layer saw: operands, keys and weights of its units. Nothing here is written to once it is collected."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lit_clipq.functional.granularity import PerTensor, extrema
from lit_clipq.nn.layout import Layout


@dataclass(frozen=True)
class Observations:
    """What one layer saw, of one batch or joined.

    Attributes:
        layout: How the tensors are cut.
        inputs: Operands with units first: (N, in) of rows, (B, C, H, W) of maps, (P, M, K) and (P, K, N) of pairs.
        keys: Global number of each unit, int64.
        weight: Squared output gradients, shape of the product; `None` where none were collected.
        target: What the product should be, if not the float product of `inputs`.
        extremes: For each operand minimum and maximum by channel, (2, channels), where units were left out that count
            for them.
    """

    layout: Layout
    inputs: tuple[Tensor, ...]
    keys: Tensor
    weight: Tensor | None = None
    target: Tensor | None = None
    extremes: tuple[Tensor, ...] | None = None

    def select(self, chosen: Tensor | slice) -> "Observations":
        """Return the units in a slice, or where a boolean (N,) holds."""
        return replace(
            self,
            inputs=tuple(x[chosen] for x in self.inputs),
            keys=self.keys[chosen],
            weight=None if self.weight is None else self.weight[chosen],
            target=None if self.target is None else self.target[chosen],
        )

    def range_of(self, operand: int) -> Tensor:
        """Return minimum and maximum of an operand, float32 (2,)."""
        if self.extremes is not None:
            low, high = self.extremes[operand]
            return torch.stack([low.min(), high.max()])
        return torch.stack(extrema(self.inputs[operand].float(), PerTensor()))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        held = (*self.inputs, self.weight, self.target, self.keys)
        return sum(x.numel() * x.element_size() for x in held if x is not None)


def joined(seen: list[Observations]) -> list[Observations]:
    """Join observations whose units have the same shape; `seen` is emptied so that nothing is held twice for long."""
    groups: dict[tuple[torch.Size, ...], list[Observations]] = {}
    for o in seen:
        groups.setdefault(tuple(x.shape[1:] for x in o.inputs), []).append(o)
    seen.clear()
    return [_join(groups.pop(shapes)) for shapes in list(groups)]


def _join(group: list[Observations]) -> Observations:
    if len(group) == 1:
        return group[0]
    layout = group[0].layout
    columns = [[*o.inputs, o.keys, o.weight, o.target] for o in group]
    extremes = [o.extremes for o in group if o.extremes is not None]
    group.clear()
    whole = []
    for i in range(len(columns[0])):
        parts = [column[i] for column in columns]
        for column in columns:
            column[i] = None
        whole.append(torch.cat(parts) if all(part is not None for part in parts) else None)  # type: ignore[arg-type]
    *inputs, keys, weight, target = whole
    widest = tuple(
        torch.stack(
            [torch.stack([e[i][0] for e in extremes]).amin(0), torch.stack([e[i][1] for e in extremes]).amax(0)]
        )
        for i in range(len(inputs) if extremes else 0)
    )
    assert keys is not None  # noqa: S101 - every observation has keys
    return Observations(layout, tuple(x for x in inputs if x is not None), keys, weight, target, widest or None)


def with_influence(data: Sequence[Observations]) -> list[Observations]:
    """Leave out units whose output gradients are all zero: no error there costs anything.

    In the last block of a tower that is pooled at one token these are all others.
    """
    kept = []
    for o in data:
        if o.weight is not None:
            matters = o.weight.flatten(1).amax(dim=1) > 0
            o = o if bool(matters.all()) else o.select(matters)
        kept.append(o)
    return kept
