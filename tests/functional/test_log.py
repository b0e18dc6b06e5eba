"""Logarithmic grids against lists of all values they represent."""

import pytest
import torch

from lit_clipq.functional.log import log_codes, log_decode, log_fake_quantize


def weights(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return torch.cat([torch.rand(5000, generator=generator) ** 6, torch.tensor([0.0, 1.0, 1e-30])]).to(dtype)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("steps", [1, 2])
def test_values_are_the_nearest_power_or_zero_past_the_last(bits, steps):
    x, last = weights(), 2**bits - 1
    powers = torch.tensor([2.0 ** (-q / steps) for q in range(last)], dtype=torch.float64)
    distance = (x.double().log2()[:, None] - powers.log2()).abs()
    expected = powers[distance.argmin(1)]
    expected[x.double().log2() < (0.5 - last) / steps] = 0
    rounded = log_fake_quantize(x, bits, steps_per_octave=steps)
    assert ((rounded.double() - expected).abs() <= 1e-6 * expected).float().mean() > 0.999
    assert rounded[-3:-1].tolist() == [0.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_codes_decode_to_the_rounded_values(dtype):
    x = weights(dtype)
    codes = log_codes(x, 4, steps_per_octave=2)
    assert (int(codes.min()), int(codes.max())) == (0, 15)
    rounded = log_fake_quantize(x, 4, steps_per_octave=2)
    assert rounded.dtype == dtype
    assert torch.equal(log_decode(codes, 4, steps_per_octave=2).to(dtype), rounded)
    assert torch.equal(rounded == 0, codes == 15)


def test_masked_positions_keep_no_weight():
    masked = torch.randn(5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf).softmax(-1)
    assert bool((log_fake_quantize(masked, 4)[masked == 0] == 0).all())


def test_gradients_pass_and_change_no_value():
    x = weights().requires_grad_()
    rounded = log_fake_quantize(x, 4)
    assert torch.equal(rounded.detach(), log_fake_quantize(x.detach(), 4))
    rounded.sum().backward()
    assert bool((x.grad == 1).all())
