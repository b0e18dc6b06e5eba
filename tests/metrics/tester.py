"""Metrics that the shared tests run over. A new metric is one more entry of CASES."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lit_clipq.metrics import CIDEr, EmbeddingAgreement, RetrievalRecall, TopKAccuracy, VQAAccuracy
from tests.metrics import oracles


@dataclass(frozen=True)
class MetricCase:
    make: Callable
    batches: list  # keyword arguments of `update`; each batch can also be evaluated alone
    oracle: Callable  # list of batches -> results


def _retrieval_batch(start):
    """Four images, seven texts, nine captions: one text belongs to two images, one image has a caption twice."""
    texts = oracles.lattice(7, 6, start + 1)
    texts[6] = texts[0]
    rows = torch.tensor([[0, 0], [1, 0], [1, 1], [2, 1], [3, 2], [3, 2], [4, 2], [5, 3], [6, 3]])
    return {
        "images": oracles.lattice(4, 6, start),
        "image_ids": start + torch.arange(4),
        "texts": texts,
        "text_ids": start + torch.arange(7),
        "pairs": rows + start,
    }


def _retrieval_oracle(batches):
    images, texts = (torch.cat([batch[key] for batch in batches]) for key in ("images", "texts"))
    image_ids, text_ids = (torch.cat([batch[key] for batch in batches]).tolist() for key in ("image_ids", "text_ids"))
    pairs = [[text_ids.index(t), image_ids.index(i)] for batch in batches for t, i in batch["pairs"].tolist()]
    return oracles.recall(images, texts, torch.tensor(pairs), (1, 3))


def _classification_batch(start):
    generator = torch.Generator().manual_seed(start)
    return {
        "logits": torch.randint(0, 4, (6, 5), generator=generator).float(),
        "labels": torch.randint(0, 5, (6,), generator=generator),
        "ids": start + torch.arange(6),
    }


def _classification_oracle(batches):
    return oracles.topk(*(torch.cat([batch[key] for batch in batches]) for key in ("logits", "labels")), (1, 3))


def _captioning_batch(start):
    """Four pictures with one to four references; one caption is a reference, one shares nothing with its own."""
    generator = torch.Generator().manual_seed(start)
    words = ["a", "the", "cat", "dog", "\u00e9t\u00e9", "sits", "on", "mat", "red", "boat"]

    def text(length):
        return " ".join(words[i] for i in torch.randint(len(words), (length,), generator=generator).tolist())

    references = [[text(4 + (i + j) % 3) for j in range(i + 1)] for i in range(4)]
    preds = [references[0][0], text(6), "zebra zebra", text(5)]
    return {"preds": preds, "target": references, "ids": start + torch.arange(4)}


def _captioning_oracle(batches):
    preds, target = ([text for batch in batches for text in batch[key]] for key in ("preds", "target"))
    return oracles.captioning(preds, target)


def _vqa_batch(start):
    """Five questions about three pictures; one answer type is in one batch only."""
    words = ("red", "blue", "green")
    generator = torch.Generator().manual_seed(start)
    votes = torch.randint(0, 3, (5, 10), generator=generator).tolist()
    return {
        "preds": [words[index] for index in torch.randint(0, 3, (5,), generator=generator).tolist()],
        "target": [[words[vote] for vote in row] for row in votes],
        "answer_type": ["yes/no", "number", "other", "other", "colour" if start == 200 else "number"],
        "ids": 10 * start + torch.arange(5),
        "image_ids": start + torch.tensor([0, 0, 1, 2, 1]),
    }


def _vqa_oracle(batches):
    columns = ([row for batch in batches for row in batch[key]] for key in ("preds", "target", "answer_type"))
    return oracles.vqa(*columns)


def _agreement_batch(start):
    """Four images and five texts, float and quantized; two of the quantized texts are level."""
    rows = {
        "images": oracles.lattice(4, 6, start),
        "float_images": oracles.lattice(4, 6, start + 1),
        "image_ids": start + torch.arange(4),
        "texts": oracles.lattice(5, 6, start + 2),
        "float_texts": oracles.lattice(5, 6, start + 3),
        "text_ids": start + torch.arange(5),
    }
    rows["texts"][3] = rows["texts"][0]
    return rows


def _agreement_oracle(batches):
    """Rows in the order of their ids, as the index has them."""
    batches = sorted(batches, key=lambda batch: int(batch["image_ids"][0]))
    kinds = ("images", "float_images", "texts", "float_texts")
    return oracles.agreement(*(torch.cat([batch[key] for batch in batches]) for key in kinds), (1, 3))


STARTS = (300, 100, 200)  # ids do not arrive in order
CASES = {
    "retrieval": MetricCase(
        lambda: RetrievalRecall(ks=(1, 3), any_identical=True),
        [_retrieval_batch(start) for start in STARTS],
        _retrieval_oracle,
    ),
    "classification": MetricCase(
        lambda: TopKAccuracy(ks=(1, 3)), [_classification_batch(start) for start in STARTS], _classification_oracle
    ),
    "agreement": MetricCase(
        lambda: EmbeddingAgreement(ks=(1, 3)), [_agreement_batch(start) for start in STARTS], _agreement_oracle
    ),
    "captioning": MetricCase(CIDEr, [_captioning_batch(start) for start in STARTS], _captioning_oracle),
    "vqa": MetricCase(VQAAccuracy, [_vqa_batch(start) for start in STARTS], _vqa_oracle),
}
