"""Top-k accuracy: oracles, ties and what is refused."""

import pytest
import torch

from lit_clipq.errors import DataError, ModelError
from lit_clipq.metrics import TopKAccuracy
from tests.metrics import oracles


def accuracy(logits, labels, ks=(1, 5), ids=None):
    metric = TopKAccuracy(ks=ks)
    metric.update(logits, labels, torch.arange(len(labels)) if ids is None else ids)
    return metric


@pytest.mark.parametrize("levels", [2, 5, 1000])  # few levels give many ties
def test_agrees_with_loops_and_enumerated_orders(levels):
    generator = torch.Generator().manual_seed(levels)
    logits = torch.randint(0, levels, (12, 6), generator=generator).float()
    labels = torch.randint(0, 6, (12,), generator=generator)
    ours = accuracy(logits, labels, (1, 2, 4)).compute()
    assert ours == pytest.approx(oracles.topk(logits, labels, (1, 2, 4)), abs=1e-14)
    assert ours == pytest.approx(oracles.topk(logits, labels, (1, 2, 4), oracles.hit_over_all_orders), abs=1e-14)


@pytest.mark.parametrize("classes", [3, 49, 1000])
def test_constant_logits_score_exactly_chance(classes):
    labels = torch.randint(0, classes, (123,))
    result = accuracy(torch.full((123, classes), 0.3), labels).compute()
    assert result == {"top1": 1 / classes, "top5": min(1.0, 5 / classes)}


def test_scores_are_in_order_of_id():
    scores = accuracy(torch.eye(3), torch.tensor([0, 1, 0]), (1,), torch.tensor([9, 4, 6])).evaluation().scores["top1"]
    assert scores.clusters.tolist() == [4, 6, 9]
    assert scores.values.tolist() == [1.0, 0.0, 1.0]


def test_broken_logits_are_counted():
    logits = torch.eye(4)
    logits[1, 0], logits[2, 3] = torch.nan, -torch.inf
    with pytest.raises(ModelError, match="those of 2 of 4 pictures contain NaN or Inf"):
        accuracy(logits, torch.arange(4)).compute()


@pytest.mark.parametrize("label", [-1, 4])
def test_label_out_of_range_is_refused(label):
    with pytest.raises(DataError, match=f"labels from 0 to 3 .4 class names., got {label}"):
        accuracy(torch.eye(4), torch.tensor([0, 1, label, 3]))


def test_one_id_for_two_samples_is_refused():
    metric = accuracy(torch.eye(4), torch.arange(4), ids=torch.tensor([0, 1, 2, 1]))
    with pytest.raises(DataError, match=r"1 repeated ids have another label or rank .for example id 1."):
        metric.compute()


def test_shapes_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match="expected logits"):
        accuracy(torch.eye(4), torch.arange(3))
