"""Twin grids against lists of all values they represent."""

import pytest
import torch

from lit_clipq.functional.twin import (
    gelu_codes,
    gelu_decode,
    gelu_fake_quantize,
    softmax_codes,
    softmax_decode,
    softmax_fake_quantize,
)

BITS = (2, 3, 4, 6, 8)


def nearest(x, values):
    """Return the entry of the sorted list `values` that is nearest to each x, in float64."""
    table = torch.tensor(values, dtype=torch.float64)
    return table[(x.double()[:, None] - table).abs().argmin(dim=1)]


def weights():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 50, generator=generator).mul(3).softmax(-1).flatten()
    return torch.cat([x, torch.tensor([0.0, 1.0, 0.25, 0.125])])


def activations():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20000, generator=generator) * 2
    return torch.cat([x * torch.sigmoid(1.702 * x), torch.tensor([0.0, -0.16361, 1e-8, -1e-8, 50.0, -50.0])])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("split", [0.001, 0.07, 0.25, 1.0])
def test_softmax_grid_is_the_table_of_its_range(bits, split):
    n, x = 2 ** (bits - 1), weights()
    below = [k * split / (n - 1) for k in range(n)]
    above = [k / (n - 1) for k in range(n)]
    expected = torch.where(x < split, nearest(x, below), nearest(x, above))
    rounded = softmax_fake_quantize(x, torch.tensor(split), bits)
    # midpoints between two codes may go either way, and float32 has its own midpoints
    agree = (rounded.double() - expected).abs() < 1e-6
    assert agree.float().mean() > 0.999
    step = torch.where(x < split, split / (n - 1), 1 / (n - 1))
    assert bool(((rounded - x).abs() <= step / 2 * 1.001 + 1e-7).all())


@pytest.mark.parametrize("bits", BITS)
def test_softmax_grid_represents_zero_and_one_exactly_and_each_value_once(bits):
    rounded = softmax_fake_quantize(torch.tensor([0.0, 1.0]), torch.tensor(0.01), bits)
    assert rounded.tolist() == [0.0, 1.0]
    small = torch.tensor([0.004])  # the sum of both halves would add the split to it
    assert softmax_fake_quantize(small, torch.tensor(0.5), 8) == pytest.approx(0.004, abs=0.002)


@pytest.mark.parametrize("bits", BITS)
def test_softmax_codes_decode_to_the_rounded_values_bit_for_bit(bits):
    x, split = weights(), torch.tensor(0.031)
    codes = softmax_codes(x, split, bits)
    assert codes.dtype == torch.int32
    assert (int(codes.min()), int(codes.max())) == (0, 2**bits - 1)
    assert torch.equal(softmax_decode(codes, split, bits), softmax_fake_quantize(x, split, bits))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("positive", [0.003, 0.3])
def test_gelu_grid_is_the_table_of_its_range(bits, positive):
    n, x = 2 ** (bits - 1), activations()
    negative = 0.16361 / n
    expected = torch.where(
        x < 0, nearest(x, [-k * negative for k in range(n + 1)]), nearest(x, [k * positive for k in range(n)])
    )
    rounded = gelu_fake_quantize(x, torch.tensor(negative), torch.tensor(positive), bits)
    assert ((rounded.double() - expected).abs() < 1e-6 * positive * n).float().mean() > 0.999
    assert rounded.min().item() == pytest.approx(-0.16361, rel=1e-6)
    assert rounded.max().item() == pytest.approx(positive * (n - 1), rel=1e-6)


@pytest.mark.parametrize("bits", BITS)
def test_gelu_codes_decode_to_the_rounded_values_bit_for_bit(bits):
    x, negative, positive = activations(), torch.tensor(0.02), torch.tensor(0.11)
    codes = gelu_codes(x, negative, positive, bits)
    assert (int(codes.min()), int(codes.max())) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert torch.equal(gelu_decode(codes, negative, positive), gelu_fake_quantize(x, negative, positive, bits))


def test_gradients_pass_inside_of_the_grid_and_change_no_value():
    split = torch.tensor(0.03)
    x = weights().requires_grad_()
    rounded = softmax_fake_quantize(x, split, 4)
    assert torch.equal(rounded.detach(), softmax_fake_quantize(x.detach(), split, 4))
    rounded[:100].sum().backward()
    assert x.grad[:100].tolist() == [1.0] * 100
    y = torch.tensor([-3.0, -0.1, 0.5, 9.0], requires_grad=True)
    rounded = gelu_fake_quantize(y, torch.tensor(0.02), torch.tensor(0.5), 4)
    assert torch.equal(rounded.detach(), gelu_fake_quantize(y.detach(), torch.tensor(0.02), torch.tensor(0.5), 4))
    rounded.sum().backward()
    assert y.grad.tolist() == [0.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_type(dtype):
    x = weights().to(dtype)
    assert softmax_fake_quantize(x, torch.tensor(0.1), 8).dtype == dtype
    assert gelu_fake_quantize(x, torch.tensor(0.1), torch.tensor(0.1), 8).dtype == dtype
