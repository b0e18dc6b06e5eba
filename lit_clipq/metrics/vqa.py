"""Accuracy of visual question answering."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lit_clipq.errors import DataError
from lit_clipq.metrics.functional.rows import distinct_ids
from lit_clipq.metrics.functional.scores import SampleScores
from lit_clipq.metrics.functional.vqa import count_matches, vqa_scores
from lit_clipq.metrics.keyed import Evaluation, SampleKeyedMetric

TYPE_BYTES = 32
_TYPE_ORDER = ("yes_no", "number", "other")
_UNKNOWN = -1  # samples that came without an id


class VQAAccuracy(SampleKeyedMetric):
    """The official accuracy of VQA v2, over all questions and for each answer type.

    See `lit_clipq.metrics.functional.vqa` for how answers are compared and scored. `compute` gives `vqa_accuracy`, and
    where answer types are given `vqa_accuracy_yes_no`, `vqa_accuracy_number`, `vqa_accuracy_other` (what is neither
    letter nor digit in the name of a type becomes "_"). All are **fractions**: 0.6717 is what papers print as 67.17.

    With ids, a question counts once, whoever saw it and how often; that it comes again with another score is an error.
    Without ids, every sample counts, in the order of arrival and of the processes. Texts are scored on arrival and not
    kept: a sample costs 64 bytes.

    Args:
        **kwargs: of `torchmetrics.Metric`.

    Example:
        >>> metric = VQAAccuracy()
        >>> metric.update(["red", "2"], [["red"] * 2 + ["orange"] * 8, ["two"] * 9 + ["3"]], ["other", "number"])
        >>> metric.compute()
        {'vqa_accuracy': 0.8, 'vqa_accuracy_number': 1.0, 'vqa_accuracy_other': 0.6}
    """

    samples: list[Tensor]  # (n, 4): id, picture, matching annotators, annotators
    types: list[Tensor]  # (n, TYPE_BYTES): name of the answer type, zeros behind it; all zeros where none is given

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_rows("samples", 4)
        self.add_rows("types", TYPE_BYTES, dtype=torch.uint8)

    def update(
        self,
        preds: Sequence[str],
        target: Sequence[Sequence[str]],
        answer_type: Sequence[str] | None = None,
        ids: Tensor | None = None,
        image_ids: Tensor | None = None,
    ) -> None:
        """Add a batch.

        Args:
            preds: Predicted answer to each of b questions.
            target: The annotators' answers to each question, at least 2 (VQA v2 has 10), not processed.
            answer_type: `yes/no`, `number`, `other` or any other name for each question.
            ids: int64 (b,), the questions' ids, not negative.
            image_ids: int64 (b,), picture of each question, which the bootstrap resamples; by default `ids`.

        Raises:
            ValueError: Lengths or dtypes do not belong together.
            DataError: A question with fewer than 2 answers, or a name of an answer type that is empty or too long.
        """
        if isinstance(preds, str) or not (
            len(preds) == len(target) == len(preds if answer_type is None else answer_type)
        ):
            raise ValueError(
                "expected a list of predictions, and as many lists of answers and answer types, got "
                f"{'one string' if isinstance(preds, str) else len(preds)}, {len(target)} and "
                f"{'none' if answer_type is None else len(answer_type)}."
            )
        count = len(preds)
        if image_ids is not None and ids is None:
            raise ValueError("expected `ids` of the questions where `image_ids` are given, got none.")
        ids = torch.full((count,), _UNKNOWN) if ids is None else _checked("ids", ids, count)
        image_ids = ids if image_ids is None else _checked("image_ids", image_ids, count)
        matches = [(count_matches(said, answers), len(answers)) for said, answers in zip(preds, target, strict=True)]
        scored = torch.tensor(matches, dtype=torch.int64, device=self.device).reshape(count, 2)
        keys = torch.stack([ids, image_ids], dim=1).to(self.device)
        self.samples.append(torch.cat([keys, scored], dim=1))
        self.types.append(_encode_types(answer_type, count).to(self.device))

    def evaluate(self) -> Evaluation:
        """Score every question, by id; without ids as they arrived."""
        samples, types = self.rows("samples").cpu(), self.rows("types").cpu()
        if not len(samples):
            raise DataError(
                "expected questions to evaluate, got none; check the data folder and the limits on batches."
            )
        unknown = samples[:, 0] == _UNKNOWN
        if bool(unknown.all()):
            samples[:, 0] = samples[:, 1] = torch.arange(len(samples))
        elif bool(unknown.any()):
            raise DataError(
                f"expected ids for all questions or for none, but {int(unknown.sum()):,} of {len(samples):,} have "
                "none; pass `ids` in every update."
            )
        distinct = distinct_ids(samples[:, 0].contiguous())
        again, before = distinct.repeated, distinct.original
        different = (samples[again] != samples[before]).any(1) | (types[again] != types[before]).any(1)
        if bool(different.any()):
            raise DataError(
                f"expected one answer to each question, but {int(different.sum()):,} repeated ids have another score, "
                f"picture or answer type (for example id {int(samples[again][different][0, 0])}); give every question "
                "its own id."
            )
        _, clusters, matches, annotators = samples[distinct.first].unbind(1)
        values = vqa_scores(matches, annotators)
        scores = {"vqa_accuracy": SampleScores(values, clusters)}
        for name, members in _by_type(types[distinct.first]).items():
            scores[f"vqa_accuracy_{name}"] = SampleScores(values[members], clusters[members])
        counts = {"questions": len(values)}
        if not bool(unknown.all()):
            counts["images"] = len(torch.unique(clusters))
        return Evaluation(scores, counts)


def _checked(name: str, ids: Tensor, count: int) -> Tensor:
    if ids.shape != (count,) or ids.dtype != torch.int64 or bool((ids < 0).any()):
        raise ValueError(
            f"expected `{name}` int64 ({count},), not negative, one for each prediction, got {ids.dtype} "
            f"{tuple(ids.shape)}{' with negative ones' if bool((ids < 0).any()) else ''}."
        )
    return ids


def _encode_types(names: Sequence[str] | None, count: int) -> Tensor:
    """Names of answer types as bytes, uint8 (count, TYPE_BYTES)."""
    if names is None:
        return torch.zeros(count, TYPE_BYTES, dtype=torch.uint8)
    texts = [re.sub(r"[^0-9a-z]+", "_", name.lower()).encode() for name in names]
    for name, text in zip(names, texts, strict=True):
        if not 0 < len(text) <= TYPE_BYTES:
            raise DataError(f"expected answer types of 1 to {TYPE_BYTES} characters, such as 'yes/no', got {name!r}.")
    padded = [list(text.ljust(TYPE_BYTES, b"\0")) for text in texts]
    return torch.tensor(padded, dtype=torch.uint8).reshape(count, TYPE_BYTES)


def _by_type(types: Tensor) -> dict[str, Tensor]:
    """Name -> bool (n,), which samples are of that type: the three of VQA v2 first, others in alphabetical order."""
    rows, row_of = torch.unique(types, dim=0, return_inverse=True)
    names = [bytes(row.tolist()).rstrip(b"\0").decode() for row in rows]
    members = {name: row_of == row for row, name in enumerate(names) if name}
    first = [name for name in _TYPE_ORDER if name in members]
    return {name: members[name] for name in first + sorted(members.keys() - set(first))}
