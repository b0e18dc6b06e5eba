"""Recall of image-text retrieval."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lit_clipq.errors import DataError
from lit_clipq.metrics.embedded import Embedded
from lit_clipq.metrics.functional.retrieval import BLOCK_BYTES, retrieval_hits
from lit_clipq.metrics.functional.rows import check_finite_rows, check_same_rows, distinct_ids, positions
from lit_clipq.metrics.functional.scores import SampleScores
from lit_clipq.metrics.keyed import Evaluation, SampleKeyedMetric


class RetrievalRecall(SampleKeyedMetric):
    """Recall@k of image to text and text to image, over all captions, with ties at their expected value.

    See `lit_clipq.metrics.functional.retrieval_hits` for what counts as a hit. `compute` gives `recall@k_i2t` (mean
    over images) and `recall@k_t2i` (mean over captions) for each k, as fractions.

    Samples are keyed by id: an id that arrives again with the same embedding (up to rounding) is dropped, with another
    one it is an error. Memory: all embeddings in float32, twice while computing, and `block_bytes`.

    Args:
        ks: how many items to look at.
        any_identical: also score `recall@k_t2i_any_identical`, where any image with this very caption is a hit.
        block_bytes: working memory for similarities.
        **kwargs: of `torchmetrics.Metric`.

    Example:
        >>> metric = RetrievalRecall(ks=(1,))
        >>> eye, ids = torch.eye(2), torch.arange(2)
        >>> metric.update(images=eye, image_ids=ids)
        >>> metric.update(texts=eye, text_ids=ids, pairs=torch.tensor([[0, 0], [1, 1]]))
        >>> metric.compute()
        {'recall@1_i2t': 1.0, 'recall@1_t2i': 1.0}
    """

    images: list[Tensor]  # float32, embeddings one after another
    image_ids: list[Tensor]
    texts: list[Tensor]
    text_ids: list[Tensor]  # (n, 2): id, number of captions with this text
    pairs: list[Tensor]  # (n, 3): text id, image id, number of captions

    def __init__(
        self,
        ks: Sequence[int] = (1, 5, 10),
        *,
        any_identical: bool = False,
        block_bytes: int = BLOCK_BYTES,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.ks, self.any_identical, self.block_bytes = tuple(ks), any_identical, block_bytes
        # Embeddings are kept flat: a process that saw none does not know their width.
        self.add_rows("images", dtype=torch.float32)
        self.add_rows("image_ids")
        self.add_rows("texts", dtype=torch.float32)
        self.add_rows("text_ids", 2)
        self.add_rows("pairs", 3)

    def update(
        self,
        images: Tensor | None = None,
        image_ids: Tensor | None = None,
        texts: Tensor | None = None,
        text_ids: Tensor | None = None,
        pairs: Tensor | None = None,
    ) -> None:
        """Add a batch of images, of texts, or of both.

        Args:
            images: floating point (b, d) embeddings, normalised or not.
            image_ids: int64 (b,).
            texts: floating point (b, d) embeddings of distinct captions.
            text_ids: int64 (b,).
            pairs: int64 (p, 2), rows (text id, image id), one for every caption that has one of these texts. A text
                that is twice in the batch brings its rows twice.

        Raises:
            ValueError: Shapes do not belong together.
            DataError: The pairs do not cover exactly the texts.
        """
        if (images is None) != (image_ids is None) or len({texts is None, text_ids is None, pairs is None}) > 1:
            raise ValueError("expected `images` with `image_ids`, and `texts` with `text_ids` and `pairs`.")
        if images is not None and image_ids is not None:
            _check_batch(images, image_ids)
            self.images.append(images.detach().to(torch.float32).reshape(-1))
            self.image_ids.append(image_ids)
        if texts is not None and text_ids is not None and pairs is not None and len(texts):
            _check_batch(texts, text_ids)
            captions, counted = _count_captions(text_ids, pairs)
            self.texts.append(texts.detach().to(torch.float32).reshape(-1))
            self.text_ids.append(torch.stack([text_ids, captions], dim=1))
            self.pairs.append(counted)

    def embedded(self) -> Embedded:
        """Return the embeddings in the states, each id once, and who belongs to whom."""
        images, image_ids = self._distinct("images", self.rows("image_ids"))
        text_rows = self.rows("text_ids")
        texts, text_ids = self._distinct("texts", text_rows[:, 0].contiguous())
        pairs = self._distinct_pairs(text_rows)
        text_of = positions(text_ids, pairs[:, 0], "texts")
        image_of = positions(image_ids, pairs[:, 1], "images")
        return Embedded(images, image_ids, texts, text_ids, torch.stack([text_of, image_of], dim=1), pairs[:, 2])

    def evaluate(self) -> Evaluation:
        """Score every image and every caption; images by id, captions by image id and text id."""
        found = self.embedded()
        images, image_ids, texts, text_ids = found.images, found.image_ids, found.texts, found.text_ids
        text_of, image_of = found.pairs.unbind(1)
        alone = len(image_ids) - len(torch.unique(image_of))
        if alone:
            raise DataError(
                f"expected a caption for every image, but {alone:,} of {len(image_ids):,} have none; "
                "leave these images out or add their captions."
            )
        order = torch.argsort(image_of * len(text_ids) + text_of)
        captions = found.pairs[order].repeat_interleave(found.captions[order], dim=0)
        hits = retrieval_hits(
            images, texts, captions, self.ks, any_identical=self.any_identical, block_bytes=self.block_bytes
        )
        image_clusters, caption_clusters = image_ids.cpu(), image_ids[captions[:, 1]].cpu()
        scores = {
            name: SampleScores(values, image_clusters if name.endswith("_i2t") else caption_clusters)
            for name, values in hits.items()
        }
        return Evaluation(scores, {"images": len(image_ids), "captions": len(captions)})

    def _distinct(self, name: str, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings float32 (n, d) and ids int64 (n,) of distinct ids, ascending."""
        if not len(ids):
            raise DataError(f"expected {name} to evaluate, got none; check the data folder and the limits on batches.")
        rows = self.rows(name).view(len(ids), -1)
        check_finite_rows(rows, f"{name[:-1]} embeddings")
        distinct = distinct_ids(ids)
        check_same_rows(rows, ids, distinct, name)
        return rows[distinct.first], ids[distinct.first]

    def _distinct_pairs(self, text_rows: Tensor) -> Tensor:
        """Rows (text id, image id, captions), each pair once, int64 (p, 3)."""
        pairs = torch.unique(self.rows("pairs"), dim=0)
        text_ids, captions = torch.unique(text_rows, dim=0).T.contiguous()
        found = torch.zeros_like(captions).index_add(0, positions(text_ids, pairs[:, 0], "texts"), pairs[:, 2])
        wrong = text_ids[found != captions]
        if len(wrong):
            raise DataError(
                f"expected each text id with the same images whenever it arrives, but {len(wrong):,} text ids differ "
                f"(for example {int(wrong[0])}); give every distinct text an id of its own."
            )
        return pairs


def _check_batch(rows: Tensor, ids: Tensor) -> None:
    if rows.ndim != 2 or ids.shape != rows.shape[:1] or ids.dtype != torch.int64:
        raise ValueError(
            "expected embeddings (n, d) and int64 ids (n,), "
            f"got {tuple(rows.shape)} and {ids.dtype} {tuple(ids.shape)}."
        )


def _count_captions(text_ids: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Captions of each text, int64 (n,), and distinct rows (text id, image id, captions), int64 (p, 3)."""
    ids, occurrences = torch.unique(text_ids, return_counts=True)
    rows, counts = torch.unique(pairs, dim=0, return_counts=True)
    text = torch.searchsorted(ids, rows[:, 0].contiguous()).clamp(max=len(ids) - 1)
    repeated = occurrences[text]
    captions = torch.zeros_like(ids).index_add(0, text, counts // repeated)
    if not torch.equal(ids[text], rows[:, 0]) or bool((counts % repeated).any()) or bool((captions == 0).any()):
        raise DataError(
            "expected `pairs` to name the image of every caption of exactly the texts in the batch "
            f"({len(ids):,} distinct texts), got {len(torch.unique(rows[:, 0])):,} text ids in {len(pairs):,} pairs; "
            "give each text its own (text id, image id) rows."
        )
    return captions[torch.searchsorted(ids, text_ids.contiguous())], torch.cat(
        [rows, (counts // repeated)[:, None]], dim=1
    )
