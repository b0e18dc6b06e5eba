"""Metrics that count every sample once, under any sharding, with ties at their expected value."""

from lit_clipq.metrics.agreement import EmbeddingAgreement
from lit_clipq.metrics.captioning import CIDEr
from lit_clipq.metrics.classification import TopKAccuracy
from lit_clipq.metrics.functional import BootstrapInterval, SampleScores, paired_bootstrap
from lit_clipq.metrics.keyed import Evaluation, SampleKeyedMetric
from lit_clipq.metrics.retrieval import RetrievalRecall
from lit_clipq.metrics.vqa import VQAAccuracy

__all__ = [
    "BootstrapInterval",
    "CIDEr",
    "EmbeddingAgreement",
    "Evaluation",
    "RetrievalRecall",
    "SampleKeyedMetric",
    "SampleScores",
    "TopKAccuracy",
    "VQAAccuracy",
    "paired_bootstrap",
]
