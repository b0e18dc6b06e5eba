"""Accuracy of classification."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lit_clipq.errors import DataError, ModelError
from lit_clipq.metrics.functional.classification import label_ranks
from lit_clipq.metrics.functional.expectation import expected_hits
from lit_clipq.metrics.functional.rows import distinct_ids
from lit_clipq.metrics.functional.scores import SampleScores
from lit_clipq.metrics.keyed import Evaluation, SampleKeyedMetric


class TopKAccuracy(SampleKeyedMetric):
    """Fraction of samples whose true class is among the k highest logits, with ties at their expected value.

    With g classes strictly above the true one and e level with it, itself included, a sample scores
    clamp((k - g) / e, 0, 1): constant logits score exactly k / classes. `compute` gives `top{k}` for each k.

    Samples are keyed by id: an id that arrives again is dropped, with another label or rank it is an error.

    Args:
        ks: how many classes to look at.
        **kwargs: of `torchmetrics.Metric`.

    Example:
        >>> metric = TopKAccuracy(ks=(1, 2))
        >>> metric.update(torch.tensor([[0.1, 0.9, 0.3]]), torch.tensor([2]), torch.tensor([0]))
        >>> metric.compute()
        {'top1': 0.0, 'top2': 1.0}
    """

    samples: list[Tensor]  # (n, 5): id, label, classes above, classes level, whether all logits are finite

    def __init__(self, ks: Sequence[int] = (1, 5), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ks = tuple(ks)
        self.add_rows("samples", 5)

    def update(self, logits: Tensor, labels: Tensor, ids: Tensor) -> None:
        """Add a batch.

        Args:
            logits: floating point (b, classes).
            labels: int64 (b,).
            ids: int64 (b,), the samples' ids.

        Raises:
            ValueError: Shapes do not belong together.
            DataError: A label is out of range.
        """
        if logits.ndim != 2 or not (labels.shape == ids.shape == logits.shape[:1]):
            raise ValueError(
                f"expected logits (n, classes), labels (n,) and ids (n,), got {tuple(logits.shape)}, "
                f"{tuple(labels.shape)} and {tuple(ids.shape)}."
            )
        logits = logits.detach()
        better, tied = label_ranks(logits, labels)
        finite = logits.isfinite().all(dim=1).long()
        self.samples.append(torch.stack([ids, labels, better, tied, finite], dim=1))

    def evaluate(self) -> Evaluation:
        """Score every sample, by id."""
        samples = self.rows("samples")
        if not len(samples):
            raise DataError("expected pictures to classify, got none; check the data folder and the limits on batches.")
        distinct = distinct_ids(samples[:, 0])
        different = (samples[distinct.repeated] != samples[distinct.original]).any(1)
        ids, _, better, tied, finite = samples[distinct.first].unbind(1)
        broken = len(ids) - int(finite.sum())
        if broken:
            raise ModelError(
                f"expected finite logits, but those of {broken:,} of {len(ids):,} pictures contain NaN or Inf; "
                "check the weights, and the quantized layers' scales."
            )
        if bool(different.any()):
            raise DataError(
                f"expected one sample per id, but {int(different.sum()):,} repeated ids have another label or rank "
                f"(for example id {int(samples[distinct.repeated][different][0, 0])}); give every picture its own id."
            )
        clusters = ids.cpu()
        scores = {f"top{k}": SampleScores(expected_hits(better, tied, 1, k), clusters) for k in self.ks}
        return Evaluation(scores, {"images": len(ids)})
