"""Lightning callbacks: they decide when, `lit_clipq` decides what."""

from callbacks.cosine import CosineSimilarity
from callbacks.mistakes import Mistakes
from callbacks.quantize import Quantize

__all__ = ["CosineSimilarity", "Mistakes", "Quantize"]
