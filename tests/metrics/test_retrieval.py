"""Recall of retrieval: oracles, ties, identical texts, memory, and what is refused."""

from fractions import Fraction
from math import comb

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lit_clipq.errors import DataError, ModelError
from lit_clipq.metrics import RetrievalRecall
from lit_clipq.metrics.functional import exact_mean, retrieval_hits
from tests.metrics import oracles


def means(hits):
    return {name: exact_mean(values) for name, values in hits.items()}


def five_captions_each(images):
    return torch.stack([torch.arange(5 * images), torch.arange(images).repeat_interleave(5)], dim=1)


@pytest.mark.parametrize("seed", range(6))
def test_tiny_cases_agree_with_enumerating_every_order(seed):
    generator = torch.Generator().manual_seed(seed)
    images, texts = oracles.lattice(4, 5, seed), oracles.lattice(5, 5, seed + 50)
    images[3], texts[4] = images[1], texts[0]
    owner = torch.tensor([0, 1, 2, 3, int(torch.randint(4, (1,), generator=generator))])
    pairs = torch.cat([torch.stack([torch.arange(5), owner], dim=1), torch.tensor([[2, 0]])])  # text 2 has two images
    ks = (1, 2, 3, 6, 9)
    ours = means(retrieval_hits(images, texts, pairs, ks, any_identical=True))
    assert ours == pytest.approx(oracles.recall(images, texts, pairs, ks, oracles.hit_over_all_orders), abs=1e-14)


@pytest.mark.parametrize("dim", [8, 32])  # the narrow one has many ties
def test_agrees_with_loops(dim):
    images, texts = oracles.lattice(16, dim, 1), oracles.lattice(60, dim, 2)
    pairs = torch.stack([torch.arange(80) % 60, torch.arange(80) % 16], dim=1)
    ours = means(retrieval_hits(images, texts, pairs, (1, 5, 10), any_identical=True))
    assert ours == pytest.approx(oracles.recall(images, texts, pairs, (1, 5, 10)), abs=1e-14)


@pytest.mark.parametrize("images", [7, 49, 159, 1000])
def test_constant_embedding_scores_exactly_chance(images):
    ones = torch.randn(1, 64).expand(5 * images, 64)
    recalls = means(retrieval_hits(ones[:images], ones, five_captions_each(images), (1, 5, 10), block_bytes=4096))
    for k in (1, 5, 10):
        assert recalls[f"recall@{k}_t2i"] == min(1.0, k / images)
        miss = Fraction(comb(5 * images - 5, k), comb(5 * images, k))
        assert recalls[f"recall@{k}_i2t"] == float(1 - miss)


def test_only_one_side_constant_scores_exactly_chance():
    images, texts = torch.randn(9, 32), torch.ones(45, 32)
    assert means(retrieval_hits(texts[:9], torch.randn(45, 32), five_captions_each(9)))["recall@1_t2i"] == 1 / 9
    assert means(retrieval_hits(images, texts, five_captions_each(9)))["recall@1_i2t"] == 1 / 9


def test_zero_embeddings_tie_with_everything():
    recalls = means(retrieval_hits(torch.zeros(4, 8), torch.randn(20, 8), five_captions_each(4), (1,)))
    assert recalls == {"recall@1_i2t": 0.25, "recall@1_t2i": 0.25}


def test_identical_embeddings_tie_whatever_their_place():
    """Float similarities of equal rows can differ with their place in a product; ours cannot."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(301, 64, generator=generator)
    captions = torch.cat([images, images])  # the caption of image i is repeated far away, for image i + 1
    pairs = torch.stack([torch.arange(602), torch.cat([torch.arange(301), (torch.arange(301) + 1) % 301])], dim=1)
    to_text = retrieval_hits(images, captions, pairs, (1, 2), block_bytes=50_000)
    assert to_text["recall@1_i2t"].eq(0.5).all()
    assert to_text["recall@2_i2t"].eq(1.0).all()
    doubled = torch.cat([images, images])
    own = torch.stack([torch.arange(301), torch.arange(301)], dim=1)
    own = torch.cat([own, own + torch.tensor([0, 301])])
    to_image = retrieval_hits(doubled, images, own, (1,), any_identical=True)
    assert to_image["recall@1_t2i"].eq(0.5).all()
    assert to_image["recall@1_t2i_any_identical"].eq(1.0).all()


def test_negative_zero_is_zero():
    images = torch.tensor([[0.0, 1.0], [-0.0, 1.0]])
    hits = retrieval_hits(images, torch.tensor([[0.3, 0.8]]), torch.tensor([[0, 0], [0, 1]]), (1,))
    assert hits["recall@1_t2i"].tolist() == [0.5, 0.5]


def test_scale_of_embeddings_and_block_size_do_not_matter():
    images, texts = oracles.lattice(30, 12, 3), oracles.lattice(150, 12, 4)
    pairs = five_captions_each(30)
    one = retrieval_hits(images, texts, pairs, any_identical=True)
    for block_bytes in (1, 1000, 7777, 10**9):
        many = retrieval_hits(images * 8, texts / 4, pairs, any_identical=True, block_bytes=block_bytes)
        assert all(torch.equal(one[name], many[name]) for name in one)


def test_bfloat16_embeddings_are_accepted():
    images, texts = oracles.lattice(6, 8, 3), oracles.lattice(30, 8, 4)
    pairs = five_captions_each(6)
    one, half = (retrieval_hits(images.to(t), texts.to(t), pairs) for t in (torch.float32, torch.bfloat16))
    assert all(torch.equal(one[name], half[name]) for name in one)


def test_any_identical_equals_own_image_where_no_text_is_shared():
    images, texts = oracles.lattice(6, 8, 3), oracles.lattice(30, 8, 4)
    hits = retrieval_hits(images, texts, five_captions_each(6), (1,), any_identical=True)
    assert torch.equal(hits["recall@1_t2i"], hits["recall@1_t2i_any_identical"])


class LargestTensor(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.nbytes = max(self.nbytes, tensor.nbytes)
        return out


def test_no_tensor_grows_with_images_times_captions():
    images, texts = torch.randn(400, 4), torch.randn(2000, 4)
    with LargestTensor() as largest:
        retrieval_hits(images, texts, five_captions_each(400), any_identical=True, block_bytes=2**16)
    assert largest.nbytes <= 2**16  # the full matrix has 3,200,000 bytes


def metric_with(**changes):
    batch = {
        "images": oracles.lattice(3, 6, 0),
        "image_ids": torch.tensor([5, 7, 9]),
        "texts": oracles.lattice(4, 6, 1),
        "text_ids": torch.tensor([0, 1, 2, 3]),
        "pairs": torch.tensor([[0, 5], [1, 5], [2, 7], [3, 9]]),
    }
    metric = RetrievalRecall()
    metric.update(**(batch | changes))
    return metric


def test_scores_are_in_order_of_picture_and_text():
    evaluation = metric_with(pairs=torch.tensor([[3, 5], [2, 7], [1, 9], [0, 9], [0, 9]])).evaluation()
    assert evaluation.scores["recall@1_i2t"].clusters.tolist() == [5, 7, 9]
    assert evaluation.scores["recall@1_t2i"].clusters.tolist() == [5, 7, 9, 9, 9]
    assert evaluation.counts == {"images": 3, "captions": 5}


@pytest.mark.parametrize(("value", "key"), [(torch.nan, "images"), (torch.inf, "texts")])
def test_broken_embeddings_are_counted(value, key):
    rows = oracles.lattice(3 if key == "images" else 4, 6, 0)
    rows[1:3, 2] = value
    with pytest.raises(ModelError, match=rf"finite {key[:-1]} embeddings, but 2 of {len(rows)} contain NaN or Inf"):
        metric_with(**{key: rows}).compute()


def test_image_without_caption_is_refused():
    metric = metric_with(pairs=torch.tensor([[0, 5], [1, 5], [2, 7], [3, 7]]))
    with pytest.raises(DataError, match="1 of 3 have none"):
        metric.compute()


def test_pair_of_an_image_that_was_not_evaluated_is_refused():
    metric = metric_with(pairs=torch.tensor([[0, 5], [1, 11], [2, 7], [3, 9]]))
    with pytest.raises(DataError, match=r"1 images have none .the first is 11."):
        metric.compute()


@pytest.mark.parametrize("pairs", [[[0, 5], [1, 7], [2, 9]], [[0, 5], [1, 7], [2, 9], [3, 9], [4, 9]]])
def test_pairs_that_do_not_cover_exactly_the_texts_are_refused(pairs):
    with pytest.raises(DataError, match="exactly the texts in the batch"):
        metric_with(pairs=torch.tensor(pairs))


def test_one_id_for_two_images_is_refused():
    metric = metric_with()
    metric.update(images=-oracles.lattice(3, 6, 0)[:1], image_ids=torch.tensor([5]))
    with pytest.raises(DataError, match=r"1 repeated images differ .*example id 5"):
        metric.compute()


def test_one_text_id_with_other_images_is_refused():
    metric = metric_with()
    metric.update(texts=oracles.lattice(4, 6, 1)[2:3], text_ids=torch.tensor([2]), pairs=torch.tensor([[2, 9]]))
    with pytest.raises(DataError, match=r"text ids differ .for example 2."):
        metric.compute()


def test_repeats_up_to_rounding_are_dropped():
    metric = metric_with()
    before = metric_with().compute()
    metric.update(images=oracles.lattice(3, 6, 0) * (1 + 1e-6), image_ids=torch.tensor([5, 7, 9]))
    assert metric.compute() == before
    assert metric.evaluation().counts == {"images": 3, "captions": 4}


def test_text_twice_in_one_batch_counts_once():
    texts = oracles.lattice(4, 6, 1)
    pairs = torch.tensor([[0, 5], [1, 5], [2, 7], [3, 9], [2, 7]])
    twice = metric_with(texts=texts[[0, 1, 2, 3, 2]], text_ids=torch.tensor([0, 1, 2, 3, 2]), pairs=pairs)
    assert twice.evaluation().counts == {"images": 3, "captions": 4}
    assert twice.compute() == metric_with().compute()


def test_arguments_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match="with `image_ids`"):
        RetrievalRecall().update(images=torch.ones(2, 3))
    with pytest.raises(ValueError, match="int64 ids"):
        RetrievalRecall().update(images=torch.ones(2, 3), image_ids=torch.arange(3))
