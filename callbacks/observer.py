"""What callbacks share that look at the embeddings of the float and of the quantized evaluation."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn

from lit_clipq.contracts import EmbeddedSamples, EmbeddingTask, Observing, Quantizing
from lit_clipq.errors import ConfigError

SeenT = TypeVar("SeenT")


class EmbeddingObserver(pl.Callback, Generic[SeenT]):
    """Looks at the embeddings of an evaluation before they are scored and forgotten; subclasses say what for.

    Attributes:
        section: Under which name the results hold what it saw.
        before: What it saw of the float network.
        after: What it saw of the quantized one.
    """

    section: ClassVar[str]

    def __init__(self) -> None:
        self.before: SeenT | None = None
        self.after: SeenT | None = None

    @abstractmethod
    def look(self, samples: EmbeddedSamples, data: object) -> SeenT:
        """Return what is kept of an evaluation."""

    @abstractmethod
    def describe(self, before: SeenT, after: SeenT | None) -> Mapping[str, Any]:
        """Return what the results hold, as plain values."""

    def seen(self) -> Mapping[str, Any] | None:
        """Return what the results hold of the last float and quantized evaluation; None if there was none."""
        return None if self.before is None else self.describe(self.before, self.after)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ask the task for its embeddings.

        Raises:
            ConfigError: For a task that does not compare pictures with texts.
        """
        if not isinstance(pl_module, EmbeddingTask):
            raise ConfigError(
                f"callbacks.{type(self).__name__} needs a task that compares pictures with texts (Retrieval, "
                f"ZeroShotClassification), got {type(pl_module).__name__}; leave the callback out"
            )
        pl_module.keep_embeddings = True
        if trainer.state.fn in (TrainerFn.VALIDATING, TrainerFn.TESTING) and self._is_float_pass(trainer):
            self.before = self.after = None

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look, before the task scores and forgets its embeddings."""
        if trainer.state.fn not in (TrainerFn.VALIDATING, TrainerFn.TESTING) or not isinstance(
            pl_module, EmbeddingTask
        ):
            return
        found = self.look(pl_module.embeddings(), trainer.datamodule)  # type: ignore[attr-defined]
        if self._is_float_pass(trainer):
            self.before = found
        else:
            self.after = found

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """As for validation."""
        self.on_validation_start(trainer, pl_module)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """As for validation."""
        self.on_validation_epoch_end(trainer, pl_module)

    @staticmethod
    def _is_float_pass(trainer: pl.Trainer) -> bool:
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        quantizing = next((callback for callback in callbacks if isinstance(callback, Quantizing)), None)
        return quantizing is None or quantizing.paused or not quantizing.active


if TYPE_CHECKING:

    def _fulfils(callback: EmbeddingObserver[Any]) -> Observing:
        """Hold the class against what the Trainer asks of it."""
        return callback
