"""How long the texts of calibration batches are, for causal text towers that are pooled at the end token."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lit_clipq.calibration.batches import Batch, sample_counts
from lit_clipq.errors import CalibrationError
from lit_clipq.models import text_lengths

Texts = Callable[[Batch], Tensor | None]
"""Returns the texts of a batch as a CLIP's text tower sees them, int64 (B, L), or `None`."""


class TextLengths:
    """Returns the valid positions (B,) of the texts in a batch, or `None` where it has none.

    Args:
        clip: A CLIP whose text tower has the end-token rule.
        texts: Names the texts of a batch; by default the second of a pair.

    Attributes:
        needed: Whether layers of the text tower are quantized, so that batches of unknown form are an error.
    """

    def __init__(self, clip: nn.Module, texts: Texts | None) -> None:
        self.clip, self.texts, self.needed = clip, texts, False

    def __call__(self, batch: Batch) -> Tensor | None:
        """Measure one batch.

        Raises:
            CalibrationError: If the batch is no pair and nobody said where its texts are, or they are no tokens.
        """
        if self.texts is None and not _is_pair(batch):
            if self.needed:
                raise CalibrationError(
                    "calibration batches are no pairs of pictures and texts, and which positions of a text count is "
                    "not known; give `texts=`, a function from a batch to its tokens (B, L), or None where it has none"
                )
            return None
        tokens: Any = batch[1] if self.texts is None else self.texts(batch)
        if tokens is None:
            return None
        whole = isinstance(tokens, Tensor) and tokens.dtype in (torch.int64, torch.int32) and tokens.dim() == 2
        if not whole or len(tokens) not in sample_counts(batch):
            got = (
                f"{tokens.dtype} of shape {tuple(tokens.shape)}"
                if isinstance(tokens, Tensor)
                else type(tokens).__name__
            )
            raise CalibrationError(
                f"expected the texts of a calibration batch as int64 (B, L), a row for each of its samples, got {got}"
            )
        return text_lengths(self.clip, tokens)


def _is_pair(batch: Batch) -> bool:
    """Whether a batch is (images, texts), either of which may be `None`."""
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        return False
    images, texts = batch
    pictures = images is None or (isinstance(images, Tensor) and images.is_floating_point())
    return pictures and (texts is None or (isinstance(texts, Tensor) and not texts.is_floating_point()))
