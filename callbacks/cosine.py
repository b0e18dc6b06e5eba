"""Cosine similarity of pictures and texts, float against quantized."""

from collections.abc import Mapping
from typing import Any, ClassVar

from callbacks.observer import EmbeddingObserver
from lit_clipq.analysis.cosine import PairCosines, describe_cosines, pair_cosines
from lit_clipq.contracts import EmbeddedSamples
from lit_clipq.errors import ConfigError


class CosineSimilarity(EmbeddingObserver[PairCosines]):
    """Add distributions of matched and unmatched image-text cosines to the results, under `cosine`.

    Density over [-1, 1], mean, shift of the mean, 1-Wasserstein distance and rank correlation between float and
    quantized on the same pairs. The float evaluation is measured anew, and not taken from an earlier run.

    Args:
        unmatched_per_image: With how many texts that are not its own each picture is compared.

    Raises:
        ConfigError: If that is below 1.
    """

    section: ClassVar[str] = "cosine"

    def __init__(self, unmatched_per_image: int = 32) -> None:
        super().__init__()
        if unmatched_per_image < 1:
            raise ConfigError(f"unmatched_per_image must be at least 1, got {unmatched_per_image}")
        self.unmatched_per_image = unmatched_per_image

    def look(self, samples: EmbeddedSamples, data: object) -> PairCosines:  # noqa: ARG002
        """Compute the cosines of a fixed choice of pairs."""
        return pair_cosines(samples.images, samples.texts, samples.pairs, unmatched_per_image=self.unmatched_per_image)

    def describe(self, before: PairCosines, after: PairCosines | None) -> Mapping[str, Any]:
        """Compare them."""
        return describe_cosines(before, after)
