"""What to leave float or make wider, as the patterns that recipes take."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from glob import escape

from lit_clipq.errors import ConfigError
from lit_clipq.functional.uniform import MAX_BITS
from lit_clipq.sensitivity.rows import Row


@dataclass(frozen=True)
class Patterns:
    """Two remedies for the same share of the error; either is to be pasted."""

    exclude: tuple[str, ...]
    """For `quantize.exclude`: layers to leave float."""
    widths: Mapping[str, str]
    """For `quantize.widths`: twice the width for single operands."""
    share: float
    """Share of the predicted error that they remove."""

    def as_yaml(self) -> str:
        """Return both as YAML, in the order in which they help."""
        exclude = "".join(f"    - {json.dumps(name)}\n" for name in self.exclude)
        widths = "".join(f"    {json.dumps(name)}: {bits}\n" for name, bits in self.widths.items())
        return f"quantize:\n  exclude:\n{exclude}# or\nquantize:\n  widths:\n{widths}"


def worth_leaving(rows: Sequence[Row], share: float = 0.5) -> Patterns:
    """Choose the fewest layers, and the fewest operands, that cause a share of the predicted error of their towers.

    Args:
        rows: Of an analysis.
        share: Between 0 and 1.

    Raises:
        ConfigError: If the share is not between 0 and 1.
    """
    if not 0 < share <= 1:
        raise ConfigError(f"share must be above 0 and at most 1, got {share}")
    layers = _fewest([row for row in rows if row.scope == "layer"], share)
    chosen: dict[str, dict[str, int]] = {}
    for row in _fewest([row for row in rows if row.scope == "operand"], share):
        letter = "w" if row.operand == "weight" else "a"
        chosen.setdefault(escape(row.layer), {})[letter] = min(2 * row.bits, MAX_BITS)
    widths = {name: "".join(f"{x}{bits[x]}" for x in "wa" if x in bits) for name, bits in chosen.items()}
    return Patterns(tuple(escape(row.layer) for row in layers), widths, share)


def _fewest(rows: Sequence[Row], share: float) -> list[Row]:
    """Return the largest rows, of each tower, that together make the share."""
    found: list[Row] = []
    for tower in dict.fromkeys(row.tower for row in rows):
        own = sorted((row for row in rows if row.tower == tower), key=lambda row: -row.predicted)
        total, reached = sum(row.predicted for row in own), 0.0
        for row in own:
            if reached >= share * total:
                break
            found.append(row)
            reached += row.predicted
    return found
