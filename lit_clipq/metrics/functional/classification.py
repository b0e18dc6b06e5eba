"""Rank of the true class among the classes."""

from typing import NamedTuple

import torch
from torch import Tensor

from lit_clipq.errors import DataError


class LabelRanks(NamedTuple):
    """Where the true class stands; both int64 (n,)."""

    better: Tensor
    """Number of classes with a strictly higher logit."""
    tied: Tensor
    """Number of classes with the same logit, the true one included."""


def label_ranks(logits: Tensor, labels: Tensor) -> LabelRanks:
    """Count the classes above and level with the true one.

    Args:
        logits: floating point (n, classes), any device.
        labels: int64 (n,), 0 .. classes - 1, same device.

    Raises:
        DataError: A label is out of range.

    Example:
        >>> ranks = label_ranks(torch.tensor([[0.1, 0.5, 0.1]]), torch.tensor([2]))
        >>> ranks.better.item(), ranks.tied.item()
        (1, 2)
    """
    classes = logits.shape[1]
    wrong = (labels < 0) | (labels >= classes)
    if bool(wrong.any()):
        raise DataError(
            f"expected labels from 0 to {classes - 1:,} ({classes:,} class names), got {int(labels[wrong][0])}; "
            "check that the class names and the class folders belong together."
        )
    true = logits.gather(1, labels[:, None])  # (n, 1)
    return LabelRanks((logits > true).sum(1, dtype=torch.int64), (logits == true).sum(1, dtype=torch.int64))
