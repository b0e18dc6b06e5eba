"""Which positions of a calibration batch's texts count."""

from typing import Any

from torch import Tensor

from lit_clipq.calibration.engine import Calibration
from lit_clipq.models import has_end_token_rule, text_lengths


def has_text_rule(calibration: Calibration) -> bool:
    """Tell whether the calibrated networks hold a CLIP whose text tower is causal and pooled at the end token."""
    clip = calibration.roots.get("clip")
    return clip is not None and has_end_token_rule(clip)


def batch_text_lengths(calibration: Calibration, batch: Any) -> Tensor | None:
    """Return the positions of each text that can influence its embedding, int64 (B,); `None` where all can.

    Args:
        calibration: The networks.
        batch: A calibration batch, (images, texts) for a CLIP.
    """
    texts = batch[1] if isinstance(batch, tuple | list) and len(batch) > 1 else None
    if texts is None or not has_text_rule(calibration):
        return None
    return text_lengths(calibration.roots["clip"], texts)
