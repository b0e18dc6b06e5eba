"""Rotations are orthogonal, and those that keep the ones commute with a LayerNorm."""

import pytest
import torch
import torch.nn.functional as F

from lit_clipq.functional.rotation import hadamard, keeping_ones, random_orthogonal


@pytest.mark.parametrize("n", [1, 2, 4, 12, 16, 20, 24, 44, 64, 72, 768])
def test_hadamard_matrices_have_orthogonal_rows_of_signs(n):
    matrix = hadamard(n)
    assert torch.equal(matrix.abs(), torch.ones(n, n, dtype=torch.float64))
    assert torch.equal(matrix @ matrix.T, n * torch.eye(n, dtype=torch.float64))
    assert torch.equal(matrix[:, 0], torch.ones(n, dtype=torch.float64))


@pytest.mark.parametrize("n", [3, 10, 30, 2730, 1152 // 32])
def test_other_sizes_have_none(n):
    assert hadamard(n) is None


@pytest.mark.parametrize("n", [1, 2, 10, 12, 30, 64])
@pytest.mark.parametrize("make", [random_orthogonal, keeping_ones])
def test_rotations_are_orthogonal_and_go_by_seed(n, make):
    matrix = make(n, 3)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.equal(matrix, make(n, 3))
    assert n < 10 or not torch.equal(matrix, make(n, 4))


@pytest.mark.parametrize("n", [10, 12, 64, 90])
def test_a_layer_norm_without_gain_commutes_with_those_that_keep_the_ones(n):
    x = torch.randn(7, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 3
    rotation = keeping_ones(n, 1)
    torch.testing.assert_close(F.layer_norm(x @ rotation, (n,)), F.layer_norm(x, (n,)) @ rotation, rtol=0, atol=1e-12)
    other = random_orthogonal(n, 1)
    assert (F.layer_norm(x @ other, (n,)) - F.layer_norm(x, (n,)) @ other).abs().max() > 0.1


def test_an_outlier_is_spread_over_all_channels():
    x = torch.zeros(768, dtype=torch.float64)
    x[5] = 100
    assert (x @ keeping_ones(768, 0)).abs().max() < 20
    assert (x[:64] @ random_orthogonal(64, 0)).abs().max() == pytest.approx(100 / 8)
