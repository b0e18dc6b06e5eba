"""How the calibration of one layer went."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerResult:
    """How the search of one layer went."""

    before: float
    """Objective of the min-max grids."""
    after: float
    """Objective of the grids found."""
    sqnr_db: float
    """Signal-to-noise ratio of the layer's output, unweighted, in dB."""
    clipped: float
    """Share of operand elements outside of their grids."""
    seconds: float
    """Wall time."""
