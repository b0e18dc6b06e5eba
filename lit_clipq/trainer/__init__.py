"""Lightning's Trainer, with float-then-quantized evaluation, sweeps, the analysis and the export."""

from lit_clipq.trainer.checks import spawning_refused
from lit_clipq.trainer.origin import versions
from lit_clipq.trainer.trainer import QuantTrainer

__all__ = ["QuantTrainer", "spawning_refused", "versions"]
