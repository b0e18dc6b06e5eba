"""Sweeps: a grid of methods, widths and calibration seeds, measured with whatever its points share done once."""

from lit_clipq.sweep.file import ResultsFile
from lit_clipq.sweep.options import GridPoint, SweepOptions, grid_of

__all__ = ["GridPoint", "ResultsFile", "SweepOptions", "grid_of"]
