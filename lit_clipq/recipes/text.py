"""Which positions of a calibration batch's texts count."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lit_clipq.calibration.collect import Rows
from lit_clipq.calibration.engine import Calibration
from lit_clipq.models import has_end_token_rule, text_lengths


def has_text_rule(calibration: Calibration) -> bool:
    """Tell whether the calibrated networks hold a CLIP whose text tower is causal and pooled at the end token."""
    clip = calibration.roots.get("clip")
    return clip is not None and has_end_token_rule(clip)


@contextmanager
def measuring_texts(calibration: Calibration, rows: Callable[[], Rows], *, end_token: bool = True) -> Iterator[None]:
    """Fill in the lengths of the texts of each batch while the context is open, as the text tower looks tokens up.

    So it does not matter in which form a batch holds its texts. Towers without the end-token rule are left alone.

    Args:
        calibration: The networks.
        rows: Returns the rows of the batch at hand.
        end_token: Whether positions behind a text's own end are left out; else those behind the longest one's.
    """
    if not has_text_rule(calibration):
        yield
        return
    clip = calibration.roots["clip"]
    tower: Any = getattr(clip, "text", clip)

    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        lengths = text_lengths(clip, inputs[0])
        rows().lengths = lengths if end_token else lengths.amax().expand(len(lengths))

    handle = tower.token_embedding.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
