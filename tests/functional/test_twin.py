"""Twin and logarithmic grids against tables of every value they can represent."""

import pytest
import torch

from lit_clipq.functional.log import log_codes, log_decode, log_fake_quantize
from lit_clipq.functional.twin import (
    gelu_codes,
    gelu_decode,
    gelu_fake_quantize,
    softmax_codes,
    softmax_decode,
    softmax_fake_quantize,
)

BITS = [2, 3, 4, 6, 8]


def nearest(x: torch.Tensor, table: list[float]) -> torch.Tensor:
    values = torch.tensor(sorted(set(table)), dtype=torch.float64)
    return (x.double()[:, None] - values).abs().amin(dim=1)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("split", [0.01, 0.125, 0.7, 1.0])
def test_softmax_values_round_to_the_nearest_of_their_own_range(bits, split):
    n = 2 ** (bits - 1)
    x = torch.rand(500, generator=torch.Generator().manual_seed(0)) ** 3
    rounded = softmax_fake_quantize(x, torch.tensor(split), bits)
    low, high = [split * k / (n - 1) for k in range(n)], [k / (n - 1) for k in range(n)]
    for part, table in ((x < split, low), (x >= split, high)):
        assert torch.allclose((rounded - x)[part].abs().double(), nearest(x[part], table), atol=1e-6)


@pytest.mark.parametrize("bits", BITS)
def test_one_is_exact_and_codes_restore_the_values(bits):
    split = torch.tensor(0.1)
    x = torch.cat([torch.rand(300, generator=torch.Generator().manual_seed(1)), torch.tensor([0.0, 0.1, 1.0])])
    codes = softmax_codes(x, split, bits)
    assert codes.min() >= 0
    assert codes.max() < 2**bits
    assert torch.equal(softmax_decode(codes, split, bits), softmax_fake_quantize(x, split, bits))
    assert softmax_fake_quantize(torch.ones(1), split, bits).item() == 1.0
    assert softmax_fake_quantize(torch.zeros(1), split, bits).item() == 0.0


@pytest.mark.parametrize("bits", BITS)
def test_gelu_values_round_to_the_nearest_of_their_own_side(bits):
    n = 2 ** (bits - 1)
    negative, positive = torch.tensor(0.17 / n), torch.tensor(3.0 / (n - 1))
    x = torch.randn(500, generator=torch.Generator().manual_seed(2)).clamp(min=-0.17)
    rounded = gelu_fake_quantize(x, negative, positive, bits)
    below, above = [-0.17 * k / n for k in range(n + 1)], [3.0 * k / (n - 1) for k in range(n)]
    for part, table in ((x < 0, below), (x >= 0, above)):
        assert torch.allclose((rounded - x)[part].abs().double(), nearest(x[part], table), atol=1e-6)
    codes = gelu_codes(x, negative, positive, bits)
    assert codes.min() >= -n
    assert codes.max() <= n - 1
    assert torch.equal(gelu_decode(codes, negative, positive), rounded)


def test_the_twin_grid_has_less_error_than_the_uniform_one_on_attention_weights():
    weights = (torch.randn(8, 50, 50, generator=torch.Generator().manual_seed(3)) * 3).softmax(dim=-1)
    for bits in (4, 6, 8):
        uniform = ((weights * (2**bits - 1)).round() / (2**bits - 1) - weights).square().mean()
        splits = torch.exp2(torch.arange(-10.0, 0.0))
        twin = min(float((softmax_fake_quantize(weights, s, bits) - weights).square().mean()) for s in splits)
        assert twin < 0.9 * uniform


def test_gradients_pass_inside_the_ranges_only():
    x = torch.tensor([-0.5, -0.1, 0.5, 9.0], requires_grad=True)
    gelu_fake_quantize(x, torch.tensor(0.17 / 8), torch.tensor(3.0 / 7), 4).sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 0.0]
    x = torch.tensor([0.05, 0.5], requires_grad=True)
    softmax_fake_quantize(x, torch.tensor(0.1), 4).sum().backward()
    assert x.grad.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("bits", [2, 4, 6])
def test_log_values_round_to_the_nearest_power_in_the_logarithm(bits, steps):
    x = torch.rand(300, generator=torch.Generator().manual_seed(4)).clamp(min=1e-6)
    table = torch.tensor([-k / steps for k in range(2**bits)], dtype=torch.float64)
    nearest_power = (x.double().log2()[:, None] - table).abs().argmin(dim=1)
    codes = log_codes(x, bits, steps_per_octave=steps)
    assert (codes != nearest_power).sum() <= 1  # a value within float32's rounding of a tie may take either neighbour
    rounded = log_fake_quantize(x, bits, steps_per_octave=steps)
    expected = torch.where(codes == 2**bits - 1, torch.tensor(0.0), torch.exp2(table[codes.long()].float()))
    assert torch.equal(rounded, expected)  # the last code stands for 0
    assert torch.equal(log_decode(codes, bits, steps_per_octave=steps), rounded)
    assert log_fake_quantize(torch.zeros(1), bits, steps_per_octave=steps).item() == 0.0
    assert log_fake_quantize(torch.ones(1), bits, steps_per_octave=steps).item() == 1.0
