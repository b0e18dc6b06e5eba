"""Agreement of two searches."""

import pytest
import torch

from lit_clipq.errors import DataError, ModelError
from lit_clipq.metrics import EmbeddingAgreement
from lit_clipq.metrics.functional import mean_ranks, ranking_agreement


def rows(count: int, seed: int, dim: int = 8) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def test_a_network_agrees_with_itself_whatever_is_tied():
    q, i = rows(20, 0), rows(15, 1)
    i[3] = i[4] = i[9]
    found = ranking_agreement((q, 7 * q), (i, 3 * i), ks=(1, 10))
    assert all(torch.equal(found[f"top{k}"], torch.ones(20, dtype=torch.float64)) for k in (1, 10))
    assert found["rank_correlation"].min() > 1 - 1e-9


def test_a_reversed_order_is_a_correlation_of_minus_one():
    q, i = rows(5, 0), rows(30, 1)
    found = ranking_agreement((q, -q), (i, i), ks=(1, 30))
    assert found["rank_correlation"].max() < -1 + 1e-9
    assert found["top1"].sum() == 0
    assert found["top30"].min() == 1


def test_constant_embeddings_agree_with_nothing_but_each_other():
    q, i, level = rows(6, 0), rows(9, 1), torch.ones(9, 8)
    assert ranking_agreement((q, q), (i, level))["rank_correlation"].tolist() == [0.0] * 6
    assert ranking_agreement((q, q), (level, level))["rank_correlation"].tolist() == [1.0] * 6


def test_blocks_do_not_change_the_result():
    q, i = (rows(40, 0), rows(40, 1)), (rows(30, 2), rows(30, 3))
    whole, cut = ranking_agreement(q, i), ranking_agreement(q, i, block_bytes=1)
    for name, values in whole.items():
        torch.testing.assert_close(cut[name], values, rtol=0, atol=1e-12)  # other shapes of products


def test_mean_ranks_are_those_of_scipys_definition():
    values = torch.tensor([[0.0, 2.0, 3.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    assert mean_ranks(values).tolist() == [[1.0, 2.5, 4.0, 2.5], [2.5, 2.5, 2.5, 2.5]]


def test_pictures_do_not_find_themselves():
    x = rows(12, 0)
    y = x + 0.3 * rows(12, 1)
    metric = EmbeddingAgreement(ks=(1, 10))
    metric.update(images=y, float_images=x, image_ids=torch.arange(12))
    found = metric.compute()
    unit = [r / r.norm(dim=1, keepdim=True) for r in (x.double(), y.double())]
    hits = []
    for number in range(12):
        best = [max((j for j in range(12) if j != number), key=lambda j, u=u: float(u[number] @ u[j])) for u in unit]
        hits.append(best[0] == best[1])
    assert found["top1_i2i"] == pytest.approx(sum(hits) / 12)
    assert 0 < found["top1_i2i"] < 1
    suffixes = ("", "_quantized_queries", "_quantized_index")
    names = {f"{metric}_i2i{s}" for metric in ("top1", "top10", "rank_correlation") for s in suffixes}
    assert set(found) == {"cosine_image", *names}


def test_a_quantized_side_of_its_own_is_each_sides_own():
    """With images that are exact, quantized queries from texts are the quantized search, and the index is exact."""
    images, texts = rows(10, 0), rows(7, 1)
    metric = EmbeddingAgreement(ks=(1,))
    ids = {"image_ids": torch.arange(10), "text_ids": torch.arange(7)}
    metric.update(images=images, float_images=images, texts=texts + rows(7, 2), float_texts=texts, **ids)
    found = metric.compute()
    assert found["top1_t2i_quantized_queries"] == found["top1_t2i"] < 1
    assert found["top1_t2i_quantized_index"] == 1
    assert found["top1_i2t_quantized_index"] == found["top1_i2t"]
    assert found["top1_i2t_quantized_queries"] == 1
    assert found["cosine_image"] == pytest.approx(1, abs=1e-12)


def test_what_cannot_be_compared_is_refused():
    metric = EmbeddingAgreement()
    with pytest.raises(ValueError, match="expected images and float_images"):
        metric.update(images=rows(2, 0), float_images=rows(3, 0), image_ids=torch.arange(2))
    with pytest.raises(ValueError, match="an item to find"):
        ranking_agreement((rows(1, 0),) * 2, (rows(1, 0),) * 2, exclude_self=True)
    one = EmbeddingAgreement()
    one.update(images=rows(1, 0), float_images=rows(1, 0), image_ids=torch.arange(1))
    with pytest.raises(DataError, match="at least 2 images"):
        one.compute()
    broken = EmbeddingAgreement()
    broken.update(images=rows(2, 0) / 0, float_images=rows(2, 0), image_ids=torch.arange(2))
    with pytest.raises(ModelError, match="NaN or Inf"):
        broken.compute()
