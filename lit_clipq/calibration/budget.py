"""How many bytes observations take, and which layers fit a memory limit together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lit_clipq.calibration.profile import Profile
from lit_clipq.errors import CalibrationError

_FLOAT_BYTES = 4
_WORKING_COPIES = 3  # of a layer's operands and outputs in its search


@dataclass(frozen=True)
class Storage:
    """How observations are kept between a pass and the search."""

    element_bytes: int = _FLOAT_BYTES
    """Size of an element: 4 in float32, 2 in bfloat16."""
    gradients: bool = True
    """Whether squared output gradients are kept beside the operands."""
    token_share: float = 1.0
    """Share of the rows of linear layers that is kept."""


@dataclass(frozen=True)
class Budget:
    """Predicts bytes from what one sample costs.

    Attributes:
        cost: What the layers see of one sample.
        samples: Calibration samples of the rank that has most, so that all ranks plan the same passes.
        limit_bytes: Bound on stored operands, gradients and search workspace; `None` is no bound.
        rows: Names of the layers of which a share of the tokens will do.
        beside: Bytes that fitting a layer takes besides what depends on samples, by name.
    """

    cost: Profile
    samples: int
    limit_bytes: int | None = None
    rows: frozenset[str] = field(default_factory=frozenset)
    beside: Mapping[str, int] = field(default_factory=dict)

    def stored_bytes(self, name: str, storage: Storage) -> int:
        """Predict the bytes of a layer's operands and squared output gradients over the samples of a rank."""
        elements = self.cost.input_elements.get(name, 0.0)
        if storage.gradients:
            elements += self.cost.output_elements.get(name, 0.0)
        return int(elements * self.samples * storage.element_bytes * self._share(name, storage))

    def workspace_bytes(self, name: str, storage: Storage) -> int:
        """Predict what fitting a layer needs on top: rounded operands, targets, candidates' outputs, matrices."""
        elements = self.cost.input_elements.get(name, 0.0) + self.cost.output_elements.get(name, 0.0)
        copies = int(_WORKING_COPIES * elements * self.samples * _FLOAT_BYTES * self._share(name, storage))
        return copies + self.beside.get(name, 0)

    def _share(self, name: str, storage: Storage) -> float:
        """Return the share of a layer's units that is kept."""
        return storage.token_share if name in self.rows else 1.0

    def groups(self, names: Sequence[str], storage: Storage) -> list[list[str]]:
        """Split layers into as few passes as the memory limit allows, in order; the same on every rank.

        Raises:
            CalibrationError: If the limit is below what one layer needs; says how much that is.
        """
        limit, groups = self.limit_bytes, [[]]  # type: tuple[int | None, list[list[str]]]
        for name in names:
            if limit is not None and self.group_bytes([name], storage) > limit:
                raise CalibrationError(
                    f"calibrating {name} needs {self.group_bytes([name], storage) / 1e9:.3f} GB beside the model, the "
                    f"limit is {limit / 1e9:.3f} GB; raise memory_limit_gb or lower calibration_samples"
                )
            if limit is not None and groups[-1] and self.group_bytes([*groups[-1], name], storage) > limit:
                groups.append([])
            groups[-1].append(name)
        return [group for group in groups if group]

    def group_bytes(self, group: Sequence[str], storage: Storage) -> int:
        """Predict the bytes that a pass over the given layers and their search need."""
        stored = sum(self.stored_bytes(name, storage) for name in group)
        return stored + max((self.workspace_bytes(name, storage) for name in group), default=0)
