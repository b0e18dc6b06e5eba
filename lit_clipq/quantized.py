"""What quantizing returns: a report, and a form of the network that can be put in its place and taken out."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from lit_clipq.calibration.results import LayerResult
from lit_clipq.errors import ConfigError
from lit_clipq.nn.swap import QuantizationMap
from lit_clipq.stages.draft import Draft


@dataclass(frozen=True)
class QuantizationReport:
    """What `quantize` did, or with `dry_run` would do."""

    recipe: str
    """Name of the recipe."""
    map: QuantizationMap
    """Every matrix product and what became of it."""
    seconds: float
    """Wall time of calibration, reading the batches included; 0 for a dry run."""
    float_bytes: int
    """Size of the float parameters and buffers."""
    quantized_bytes: int
    """Size of codes (packed to their width), grids and whatever stayed float."""
    passes: int
    """Passes over the calibration set."""
    memory_bytes: int
    """Predicted size of what calibration stores beside the model."""
    samples: int
    """Calibration samples of a pass, over all ranks."""
    layers: dict[str, LayerResult]
    """How the search of each layer went; empty for recipes that do not search."""
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What each stage says of itself, by its name; plain values."""
    structure: tuple[Mapping[str, Any], ...] = ()
    """What the network has besides the float one; see `lit_clipq.nn.structure`."""


class Quantized:
    """One quantized form of a network, which takes its place and gives it back.

    Attributes:
        report: What was done.

    Args:
        draft: Its finished draft; `None` where nothing was to be quantized.
        report: What was done.
    """

    def __init__(self, draft: Draft | None, report: QuantizationReport) -> None:
        self._draft, self.report = draft, report

    @property
    def draft(self) -> Draft:
        """The finished draft that it is made of.

        Raises:
            ConfigError: If nothing was to be quantized.
        """
        if self._draft is None:
            raise ConfigError("nothing was quantized: all widths are 32 bits; give less")
        return self._draft

    def install(self) -> None:
        """Make the network the quantized one; another form of the same network must not be in place."""
        if self._draft is not None:
            with torch.inference_mode(False), torch.no_grad():
                self._draft.install()

    def remove(self) -> None:
        """Make the network the float one again, to the bit."""
        if self._draft is not None:
            with torch.inference_mode(False), torch.no_grad():
                self._draft.remove()

    @contextmanager
    def installed(self) -> Iterator[QuantizationReport]:
        """Let the network be the quantized one while the context is open."""
        self.install()
        try:
            yield self.report
        finally:
            self.remove()
