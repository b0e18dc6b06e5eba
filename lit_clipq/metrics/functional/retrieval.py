"""Recall of image-text retrieval in both directions, exact under ties, without the full similarity matrix.

Ties are exact by construction: identical embeddings are found first, each stands in the gallery once with the number
of items it stands for, and a query's relevant scores are read from the same row of the same product as all others.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_clipq.metrics.functional.expectation import expected_hits
from lit_clipq.metrics.functional.rows import check_finite_rows, distinct_rows

BLOCK_BYTES = 64 * 2**20


class Relevance(NamedTuple):
    """Which gallery rows answer which query: three int64 (r,), sorted by query, every query at least once."""

    query: Tensor
    """Query number."""
    item: Tensor
    """Row of the gallery."""
    multiplicity: Tensor
    """How many of the items that this row stands for are relevant to the query."""


class RelevantRanks(NamedTuple):
    """Where each query's best relevant item stands; three int64 (queries,)."""

    better: Tensor
    """Items with a strictly higher similarity."""
    tied: Tensor
    """Items with the same similarity, itself included."""
    relevant: Tensor
    """Relevant items among the tied ones."""

    def hits(self, k: int) -> Tensor:
        """Expected hits among the first k, float64 (queries,) on the CPU."""
        return expected_hits(self.better, self.tied, self.relevant, k)


class _Units(NamedTuple):
    """Distinct embeddings, normalised, and which of them each sample has."""

    rows: Tensor  # float32 (u, d)
    group: Tensor  # int64 (n,)


def recall_name(k: int, direction: str) -> str:
    """Name of a recall as tables and result files have it.

    Example:
        >>> recall_name(5, "i2t")
        'recall@5_i2t'
    """
    return f"recall@{k}_{direction}"


@torch.no_grad()
def retrieval_hits(
    images: Tensor,
    texts: Tensor,
    pairs: Tensor,
    ks: Sequence[int] = (1, 5, 10),
    *,
    any_identical: bool = False,
    block_bytes: int = BLOCK_BYTES,
) -> dict[str, Tensor]:
    """Expected hit of every query, image to text and text to image, by cosine similarity.

    Image to text: the query is an image, the gallery is every caption (each counts, identical ones too), and a hit is
    at least one of the image's own captions among the first k; an identical caption of another image is no hit, but
    ties with it. Text to image: the query is a caption, the gallery is every image, and a hit is its own image.
    Equal similarities count as their expected value under a random order (see `expected_hits`).

    Args:
        images: floating point (images, d), any scale and device.
        texts: floating point (texts, d), one row per distinct caption.
        pairs: int64 (captions, 2), rows (row of `texts`, row of `images`), one per caption. A row may repeat: an image
            that has the same caption twice. Every image and every text occurs.
        ks: how many items to look at.
        any_identical: also score text to image with a hit on any image that has this very caption
            (`recall@k_t2i_any_identical`).
        block_bytes: working memory of a block of similarities. Memory never depends on images x captions.

    Returns:
        `recall@k_i2t`: float64 (images,), `recall@k_t2i`: float64 (captions,) in the order of `pairs`; on the CPU.

    Raises:
        ModelError: An embedding holds NaN or Inf.

    Example:
        >>> one = torch.ones(4, 2)  # constant embeddings: every recall is chance
        >>> own = torch.arange(4)[:, None].expand(4, 2)
        >>> retrieval_hits(one, one, own, ks=[1])["recall@1_t2i"].tolist()
        [0.25, 0.25, 0.25, 0.25]
    """
    image_units, text_units = _units(images, "image embeddings"), _units(texts, "text embeddings")
    to_text = _rank_texts(image_units, text_units, pairs, block_bytes)
    to_image, caption = _rank_images(image_units, text_units, pairs, block_bytes)
    hits = {recall_name(k, "i2t"): to_text.hits(k) for k in ks}
    own = {k: to_image.hits(k)[caption] for k in ks}
    hits |= {recall_name(k, "t2i"): own[k] for k in ks}
    if any_identical:
        shared, number = _shared_texts(pairs)
        is_shared = number >= 0
        ranks = _rank_any_image(image_units, text_units, shared, block_bytes) if len(shared) else None
        for k in ks:
            values = own[k].clone()
            if ranks is not None:
                values[is_shared] = ranks.hits(k)[number[is_shared]]
            hits[recall_name(k, "t2i_any_identical")] = values
    return hits


def relevant_ranks(
    queries: Tensor,
    query_rows: Tensor,
    gallery: Tensor,
    gallery_counts: Tensor,
    relevance: Relevance,
    block_bytes: int = BLOCK_BYTES,
) -> RelevantRanks:
    """Compare every query with the whole gallery and find where its best relevant item stands.

    Args:
        queries: float32 (u, d).
        query_rows: int64 (q,), the row of `queries` that each query has.
        gallery: float32 (g, d), distinct rows.
        gallery_counts: int64 (g,), how many items each row stands for.
        relevance: which items are relevant.
        block_bytes: working memory; at least one query's similarities are held.

    Returns:
        Counts of items, in the order of `query_rows`.
    """
    # Sums of counts are exact in float32 below 2^24, and a product with a vector is far faster than an integer sum.
    exact = torch.float32 if int(gallery_counts.sum()) < 2**24 else torch.float64
    weights = gallery_counts.to(exact)
    row_bytes = len(gallery) * (gallery.element_size() + weights.element_size())
    size = max(1, block_bytes // max(1, row_bytes))
    blocks = []
    for start in range(0, len(query_rows), size):
        rows = query_rows[start : start + size]
        similarity = queries[rows] @ gallery.T  # (block, g)
        bounds = torch.tensor([start, start + len(rows)], device=rows.device)
        low, high = torch.searchsorted(relevance.query, bounds).tolist()
        query, item, count = (part[low:high] for part in relevance)
        query = query - start
        scores = similarity[query, item]
        best = scores.new_full((len(rows),), -torch.inf).scatter_reduce(0, query, scores, "amax")
        relevant = torch.zeros_like(rows).index_add(0, query, count * (scores == best[query]))
        flags = torch.empty_like(similarity, dtype=exact)
        better = torch.gt(similarity, best[:, None], out=flags) @ weights
        tied = torch.eq(similarity, best[:, None], out=flags) @ weights
        blocks.append(torch.stack([better.long(), tied.long(), relevant]))
    return RelevantRanks(*torch.cat(blocks, dim=1))


def _units(rows: Tensor, what: str) -> _Units:
    """Distinct rows divided by their length; a zero row stays zero and has similarity 0 with everything."""
    check_finite_rows(rows, what)
    distinct = distinct_rows(rows)
    return _Units(F.normalize(rows[distinct.first].float(), dim=1), distinct.group)


def _counted_pairs(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Distinct (left, right), sorted, how often each occurs, and where each pair went. All int64."""
    base = int(right.max()) + 1
    keys, inverse, counts = torch.unique(left * base + right, return_inverse=True, return_counts=True)
    return keys // base, keys % base, counts, inverse


def _rank_texts(images: _Units, texts: _Units, pairs: Tensor, block_bytes: int) -> RelevantRanks:
    """Rank all captions for every image."""
    text = texts.group[pairs[:, 0]]  # (captions,)
    image, item, count, _ = _counted_pairs(pairs[:, 1], text)
    captions = torch.bincount(text, minlength=len(texts.rows))
    return relevant_ranks(images.rows, images.group, texts.rows, captions, Relevance(image, item, count), block_bytes)


def _rank_images(images: _Units, texts: _Units, pairs: Tensor, block_bytes: int) -> tuple[RelevantRanks, Tensor]:
    """Rank all images for every distinct (caption, own image), and the number of that query for each caption."""
    text, item, _, query = _counted_pairs(texts.group[pairs[:, 0]], images.group[pairs[:, 1]])
    relevance = Relevance(torch.arange(len(item), device=item.device), item, torch.ones_like(item))
    ranks = relevant_ranks(texts.rows, text, images.rows, _image_counts(images), relevance, block_bytes)
    return ranks, query.cpu()


def _shared_texts(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct (text, image) of texts that several images have, renumbered by text, and each caption's number or -1.

    Returns:
        int64 (r, 3) rows (query number, row of texts, row of images), sorted; int64 (captions,) on the CPU.
    """
    text, image, _, _ = _counted_pairs(pairs[:, 0], pairs[:, 1])
    rows, position, images = torch.unique_consecutive(text, return_inverse=True, return_counts=True)
    shared = images > 1
    number = torch.where(shared, shared.cumsum(0) - 1, -1)
    caption = number[torch.searchsorted(rows, pairs[:, 0].contiguous())]
    table = torch.stack([number[position], text, image], dim=1)
    return table[shared[position]], caption.cpu()


def _rank_any_image(images: _Units, texts: _Units, shared: Tensor, block_bytes: int) -> RelevantRanks:
    """Rank all images for every text that several images have, each of them relevant."""
    query, item, count, _ = _counted_pairs(shared[:, 0], images.group[shared[:, 2]])
    first = torch.searchsorted(shared[:, 0].contiguous(), torch.unique(query))
    rows = texts.group[shared[first, 1]]
    relevance = Relevance(query, item, count)
    return relevant_ranks(texts.rows, rows, images.rows, _image_counts(images), relevance, block_bytes)


def _image_counts(images: _Units) -> Tensor:
    return torch.bincount(images.group, minlength=len(images.rows))
