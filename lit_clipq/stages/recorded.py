"""A stage that was run elsewhere, and of which only name and options are known here."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lit_clipq.calibration.needs import Write
from lit_clipq.errors import ConfigError
from lit_clipq.nn.swap import Layer, QuantizationMap
from lit_clipq.stages.draft import Draft
from lit_clipq.stages.stage import GridStage, Report


@dataclass(frozen=True)
class Recorded(GridStage):
    """The record of a stage in the recipe of a loaded model. It is not registered and cannot be run."""

    writes = frozenset({Write.STRUCTURE, Write.SCALES})

    name: str = field(default="recorded")  # type: ignore[misc]
    """What the stage is called where it is known."""
    record: str = "{}"
    """Its options as JSON."""

    def options(self) -> dict[str, Any]:
        """Return its options as they were recorded."""
        return dict(json.loads(self.record))

    def check(self, plan: QuantizationMap, layers: Sequence[Layer]) -> None:  # noqa: ARG002
        """Refuse to be run."""
        self._refuse()

    def assign(self, draft: Draft) -> Report:  # noqa: ARG002
        """Refuse to be run."""
        return self._refuse()

    def _refuse(self) -> Report:
        raise ConfigError(
            f"stage {self.name} is known here by the record of a saved model only; import the module that defines it, "
            f"or give it as module.Class (options {self.options()})"
        )
