"""Metrics as pure functions of tensors."""

from lit_clipq.metrics.functional.bootstrap import BootstrapInterval, paired_bootstrap
from lit_clipq.metrics.functional.classification import LabelRanks, label_ranks
from lit_clipq.metrics.functional.expectation import exact_mean, expected_hits
from lit_clipq.metrics.functional.retrieval import recall_name, retrieval_hits
from lit_clipq.metrics.functional.rows import distinct_rows
from lit_clipq.metrics.functional.scores import SampleScores
from lit_clipq.metrics.functional.vqa import AnswerVocabulary, count_matches, process_answer, vqa_scores

__all__ = [
    "AnswerVocabulary",
    "BootstrapInterval",
    "LabelRanks",
    "SampleScores",
    "count_matches",
    "distinct_rows",
    "exact_mean",
    "expected_hits",
    "label_ranks",
    "paired_bootstrap",
    "process_answer",
    "recall_name",
    "retrieval_hits",
    "vqa_scores",
]
