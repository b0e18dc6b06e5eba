"""Lightning callbacks: they decide when, `lit_clipq` decides what."""

from callbacks.quantize import Quantize

__all__ = ["Quantize"]
