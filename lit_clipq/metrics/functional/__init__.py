"""Metrics as pure functions of tensors."""

from lit_clipq.metrics.functional.agreement import cosine_of_pairs, mean_ranks, ranking_agreement
from lit_clipq.metrics.functional.bootstrap import BootstrapInterval, paired_bootstrap
from lit_clipq.metrics.functional.caption_files import match_captions, read_captions, write_captions
from lit_clipq.metrics.functional.cider import cider_d
from lit_clipq.metrics.functional.classification import LabelRanks, label_ranks
from lit_clipq.metrics.functional.expectation import exact_mean, expected_hits
from lit_clipq.metrics.functional.overlap import corpus_bleu, rouge_l
from lit_clipq.metrics.functional.ptb import ptb_tokens
from lit_clipq.metrics.functional.retrieval import recall_name, retrieval_hits
from lit_clipq.metrics.functional.rows import distinct_rows
from lit_clipq.metrics.functional.scores import SampleScores
from lit_clipq.metrics.functional.vqa import AnswerVocabulary, count_matches, process_answer, vqa_scores

__all__ = [
    "AnswerVocabulary",
    "BootstrapInterval",
    "LabelRanks",
    "SampleScores",
    "cider_d",
    "corpus_bleu",
    "cosine_of_pairs",
    "count_matches",
    "distinct_rows",
    "exact_mean",
    "expected_hits",
    "label_ranks",
    "match_captions",
    "mean_ranks",
    "paired_bootstrap",
    "process_answer",
    "ptb_tokens",
    "ranking_agreement",
    "read_captions",
    "recall_name",
    "retrieval_hits",
    "rouge_l",
    "vqa_scores",
    "write_captions",
]
