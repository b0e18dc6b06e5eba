"""Embeddings of pictures and texts, and which belong together."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_clipq.metrics.functional.rows import distinct_ids
from lit_clipq.metrics.keyed import Evaluation, SampleKeyedMetric


@dataclass(frozen=True)
class Embedded:
    """Embeddings of an evaluation, each sample once, in ascending order of the ids."""

    images: Tensor
    """float32 (n, d)."""
    image_ids: Tensor
    """int64 (n,)."""
    texts: Tensor
    """float32 (m, d)."""
    text_ids: Tensor
    """int64 (m,)."""
    pairs: Tensor
    """int64 (p, 2), rows (position in `texts`, position in `images`)."""
    captions: Tensor
    """int64 (p,): how many captions each pair stands for."""


class KeptImages(SampleKeyedMetric):
    """Embeddings of pictures with their labels, of all ranks; no score comes of them."""

    images: list[Tensor]  # float32, one after another
    samples: list[Tensor]  # (n, 2): id, label

    def __init__(self) -> None:
        super().__init__()
        self.add_rows("images", dtype=torch.float32)
        self.add_rows("samples", 2)

    def update(self, images: Tensor, labels: Tensor, ids: Tensor) -> None:
        """Add a batch of embeddings (b, d), with labels and ids int64 (b,)."""
        self.images.append(images.detach().float().reshape(-1))
        self.samples.append(torch.stack([ids, labels], dim=1))

    def evaluate(self) -> Evaluation:
        """Count the pictures."""
        return Evaluation({}, {"images": len(distinct_ids(self.rows("samples")[:, 0].contiguous()).first)})

    def with_classes(self, classes: Tensor) -> Embedded:
        """Return the pictures, of all ranks, with the embeddings of the classes as texts.

        Args:
            classes: float32 (c, d).
        """
        with self.sync_context():
            samples = self.rows("samples")
            images = self.rows("images").view(len(samples), -1)
            ids = samples[:, 0].contiguous()
            first = distinct_ids(ids).first
            labels = samples[first, 1]
            pairs = torch.stack([labels, torch.arange(len(labels), device=labels.device)], dim=1)
            numbers = torch.arange(len(classes), device=classes.device)
            return Embedded(images[first], ids[first], classes, numbers, pairs, torch.ones_like(labels))
