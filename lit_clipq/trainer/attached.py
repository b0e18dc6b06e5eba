"""The callbacks that a Trainer has and that its runs are about."""

from lightning.pytorch import Callback, Trainer

from lit_clipq.api import QuantizationReport
from lit_clipq.contracts import Observing, Quantizing
from lit_clipq.recipes import Recipe

QuantizeCallback = Quantizing[Recipe, QuantizationReport]
"""The callback that quantizes, with this program's recipes and reports."""


def quantizing_of(trainer: Trainer) -> QuantizeCallback | None:
    """Return the callback that quantizes, if there is one."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, Quantizing)), None)


def observing_of(trainer: Trainer) -> list[Observing]:
    """Return the callbacks that observe."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, Observing)]
