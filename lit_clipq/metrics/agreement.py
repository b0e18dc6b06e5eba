"""Agreement of quantized with float embeddings, for pictures without labels."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lit_clipq.errors import DataError
from lit_clipq.metrics.functional.agreement import BLOCK_BYTES, cosine_of_pairs, ranking_agreement
from lit_clipq.metrics.functional.rows import check_finite_rows, check_same_rows, distinct_ids
from lit_clipq.metrics.functional.scores import SampleScores
from lit_clipq.metrics.keyed import Evaluation, SampleKeyedMetric

KINDS = ("image", "text")


class EmbeddingAgreement(SampleKeyedMetric):
    """How far a quantized network searches as the float one does, over items without labels.

    `cosine_image` and `cosine_text` are the mean cosine similarity of an item's quantized and its float embedding.
    Where there are texts, texts look for images (`t2i`) and images for texts (`i2t`); else images for other images
    (`i2i`). For each direction `top{k}_*` and `rank_correlation_*` compare the search of the quantized network with
    that of the float one; `*_quantized_queries` that of quantized queries in an index of float embeddings, and
    `*_quantized_index` that of float queries in an index of quantized embeddings, as a service has them that
    quantizes one side. See `lit_clipq.metrics.functional.ranking_agreement`.

    Samples are keyed by id: an id that arrives again with the same embeddings (up to rounding) is dropped, with other
    ones it is an error.

    Args:
        ks: how many items to look at.
        block_bytes: working memory for similarities.
        **kwargs: of `torchmetrics.Metric`.

    Example:
        >>> metric = EmbeddingAgreement(ks=(1,))
        >>> metric.update(images=torch.eye(3), float_images=torch.eye(3), image_ids=torch.arange(3))
        >>> metric.compute()["cosine_image"]
        1.0
    """

    def __init__(self, ks: Sequence[int] = (1, 10), *, block_bytes: int = BLOCK_BYTES, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ks, self.block_bytes = tuple(ks), block_bytes
        for kind in KINDS:  # embeddings are kept flat: a process that saw none does not know their width
            self.add_rows(f"{kind}s", dtype=torch.float32)
            self.add_rows(f"float_{kind}s", dtype=torch.float32)
            self.add_rows(f"{kind}_ids")

    def update(
        self,
        images: Tensor | None = None,
        float_images: Tensor | None = None,
        image_ids: Tensor | None = None,
        texts: Tensor | None = None,
        float_texts: Tensor | None = None,
        text_ids: Tensor | None = None,
    ) -> None:
        """Add a batch of images, of texts, or of both.

        Args:
            images: floating point (b, d) embeddings of the quantized network, normalised or not.
            float_images: those of the float network, of the same images.
            image_ids: int64 (b,).
            texts: floating point (b, d) embeddings of the quantized network.
            float_texts: those of the float network, of the same texts.
            text_ids: int64 (b,).

        Raises:
            ValueError: Shapes do not belong together.
        """
        for kind, rows, floats, ids in (
            ("image", images, float_images, image_ids),
            ("text", texts, float_texts, text_ids),
        ):
            if rows is None and floats is None and ids is None:
                continue
            if rows is None or floats is None or ids is None or rows.shape != floats.shape or len(rows) != len(ids):
                raise ValueError(
                    f"expected {kind}s and float_{kind}s (n, d) with {kind}_ids (n,), got "
                    f"{[None if x is None else tuple(x.shape) for x in (rows, floats, ids)]}."
                )
            getattr(self, f"{kind}s").append(rows.detach().to(torch.float32).reshape(-1))
            getattr(self, f"float_{kind}s").append(floats.detach().to(torch.float32).reshape(-1))
            getattr(self, f"{kind}_ids").append(ids)

    def evaluate(self) -> Evaluation:
        """Score every image and every text as a query, by id."""
        ids, quantized, floats = {}, {}, {}
        for kind in KINDS:
            if len(self.rows(f"{kind}_ids")):
                ids[kind], quantized[kind], floats[kind] = self._distinct(kind)
        if "image" not in ids:
            raise DataError("expected images to compare, got none; check the data folder and the limits on batches.")
        if "text" not in ids and len(ids["image"]) < 2:
            raise DataError("expected at least 2 images to look for each other, got 1; give more pictures or captions.")
        clusters = {kind: values.cpu() for kind, values in ids.items()}
        scores = {
            f"cosine_{kind}": SampleScores(cosine_of_pairs(quantized[kind], floats[kind]), clusters[kind])
            for kind in ids
        }
        directions = (("t2i", "text", "image"), ("i2t", "image", "text"))
        for name, query, item in directions if "text" in ids else (("i2i", "image", "image"),):
            for suffix, q, i in (
                ("", quantized, quantized),
                ("_quantized_queries", quantized, floats),
                ("_quantized_index", floats, quantized),
            ):
                found = ranking_agreement(
                    (floats[query], q[query]),
                    (floats[item], i[item]),
                    self.ks,
                    exclude_self=query == item,
                    block_bytes=self.block_bytes,
                )
                scores |= {
                    f"{metric}_{name}{suffix}": SampleScores(values, clusters[query])
                    for metric, values in found.items()
                }
        return Evaluation(scores, {f"{kind}s": len(values) for kind, values in ids.items()})

    def _distinct(self, kind: str) -> tuple[Tensor, Tensor, Tensor]:
        """Ids int64 (n,) of distinct ids, ascending, with their quantized and float embeddings float32 (n, d)."""
        ids = self.rows(f"{kind}_ids")
        distinct = distinct_ids(ids)
        found = []
        for name in (f"{kind}s", f"float_{kind}s"):
            rows = self.rows(name).view(len(ids), -1)
            check_finite_rows(rows, f"{kind} embeddings")
            check_same_rows(rows, ids, distinct, name)
            found.append(rows[distinct.first])
        return ids[distinct.first], found[0], found[1]
