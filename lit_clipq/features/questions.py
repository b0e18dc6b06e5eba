"""Batches of questions with the cached features of their pictures and words."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_clipq.contracts import AskedQuestion
from lit_clipq.features.store import FeatureStore


class FeatureBatch:
    """Collate questions to what a head reads; the caches are read and nothing else.

    Called with questions it returns `image` and `text` features (B, l, D) as stored, `image_scales` and `text_scales`
    float32 (B, l) where they are int8, boolean masks `image_mask` and `text_mask` (B, l), `targets` float32 (B, V),
    `question_ids` and `image_ids` int64 (B,), and the lists `answers` and `answer_types`.

    Args:
        images: Features of every picture.
        image_rows: Number of a picture in `images`, by its id.
        texts: Features of every distinct question.
        text_rows: Number of a question's text in `texts`, by the text.
        encode: Maps the answers given to B questions to their targets, float32 (B, V).
    """

    def __init__(
        self,
        images: FeatureStore,
        image_rows: Mapping[int, int],
        texts: FeatureStore,
        text_rows: Mapping[str, int],
        encode: Callable[[Sequence[Sequence[str]]], Tensor],
    ) -> None:
        self.images = images
        self.image_rows = image_rows
        self.texts = texts
        self.text_rows = text_rows
        self.encode = encode

    def __call__(self, questions: Sequence[AskedQuestion]) -> dict[str, Any]:
        """Return the batch."""
        answers = [list(question.answers) for question in questions]
        batch: dict[str, Any] = {
            "targets": self.encode(answers),
            "question_ids": torch.tensor([question.question_id for question in questions]),
            "image_ids": torch.tensor([question.image_id for question in questions]),
            "answers": answers,
            "answer_types": [question.answer_type for question in questions],
        }
        read = {
            "image": [self.images.read(self.image_rows[question.image_id]) for question in questions],
            "text": [self.texts.read(self.text_rows[question.text]) for question in questions],
        }
        for name, items in read.items():
            values, scales, mask = _padded(items)
            batch |= {name: values, f"{name}_mask": mask}
            if scales is not None:
                batch[f"{name}_scales"] = scales
        return batch


def _padded(items: Sequence[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None, Tensor]:
    """Stack items (l, D) with zeros behind the shorter ones; returns values, scales and the mask of what is real."""
    lengths = torch.tensor([len(values) for values, _ in items])
    longest = int(lengths.max())
    first, first_scales = items[0]
    values = first.new_zeros(len(items), longest, first.shape[1])
    scales = None if first_scales is None else first_scales.new_zeros(len(items), longest)
    for row, (item, item_scales) in enumerate(items):
        values[row, : len(item)] = item
        if scales is not None and item_scales is not None:
            scales[row, : len(item)] = item_scales
    return values, scales, torch.arange(longest) < lengths[:, None]
