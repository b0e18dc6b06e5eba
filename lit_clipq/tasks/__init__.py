"""Tasks people use CLIP for, as LightningModules that do not know about quantization."""

from lit_clipq.tasks.agreement import Agreement
from lit_clipq.tasks.captioning import Captioning
from lit_clipq.tasks.classification import ZeroShotClassification
from lit_clipq.tasks.contrastive import ContrastiveTask
from lit_clipq.tasks.image_classification import ImageClassification
from lit_clipq.tasks.language import LanguageModelling
from lit_clipq.tasks.retrieval import Retrieval
from lit_clipq.tasks.task import ClipTask, EvaluationTask
from lit_clipq.tasks.vqa import VQA

__all__ = [
    "VQA",
    "Agreement",
    "Captioning",
    "ClipTask",
    "ContrastiveTask",
    "EvaluationTask",
    "ImageClassification",
    "LanguageModelling",
    "Retrieval",
    "ZeroShotClassification",
]
