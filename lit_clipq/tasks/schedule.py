"""The optimizer that the pre-training tasks share."""

import math
from collections.abc import Iterable

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn

from lit_clipq.errors import ConfigError


def check_schedule(learning_rate: float, warmup_steps: int, schedule_steps: int | None) -> None:
    """Refuse options that no schedule has.

    Raises:
        ConfigError: For a rate or a length below its least value.
    """
    if learning_rate <= 0 or warmup_steps < 0 or (schedule_steps is not None and schedule_steps < 1):
        raise ConfigError(
            f"expected learning_rate > 0, warmup_steps >= 0 and schedule_steps >= 1 or null, got {learning_rate}, "
            f"{warmup_steps} and {schedule_steps}; correct them under --model."
        )


def adamw_with_cosine(
    parameters: Iterable[nn.Parameter], learning_rate: float, weight_decay: float, warmup_steps: int, total_steps: int
) -> OptimizerLRScheduler:
    """Return AdamW with decay on matrices only, and its schedule: linear warm-up, then a cosine to zero.

    Args:
        parameters: What is trained; frozen ones are left out.
        learning_rate: At the end of the warm-up.
        weight_decay: On parameters with two axes or more.
        warmup_steps: Optimizer steps of linear warm-up.
        total_steps: Optimizer steps after which the cosine reaches zero.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), eps=1e-6)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
