"""Logarithmic grids of an adaptive base against lists of all values they represent."""

import math

import pytest
import torch

from lit_clipq.functional.adaptive_log import LEAST, MOST, STEPS, adaptive_log_codes, adaptive_log_values
from lit_clipq.functional.log import log_codes, log_decode
from lit_clipq.nn.adaptive_log import AdaptiveLogQuantizer


def quantizer(bits, base, scale=1.0, minimum=0.0):
    grid = AdaptiveLogQuantizer(bits, minimum)
    grid.base, grid.scale = torch.tensor(base, dtype=torch.int32), torch.tensor(scale)
    return grid


def weights(count=4000):
    generator = torch.Generator().manual_seed(0)
    return torch.cat([torch.rand(count, generator=generator) ** 6, torch.tensor([0.0, 1.0, 1e-30])])


def naive_values(base, bits):
    """The equation of the module in Python's floats."""
    levels = 2 ** (bits + 1) - 2
    table = [round(2 ** (-k / STEPS) * levels) / levels for k in range(STEPS)]
    codes = range(2**bits - 1)
    return [*(2.0 ** -(base * c // STEPS) * table[base * c % STEPS] for c in codes), 0.0]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("base", [LEAST, 10, 37, 53, MOST])
def test_values_and_codes_are_those_of_the_equation(bits, base):
    values = naive_values(base, bits)
    found = adaptive_log_values(torch.tensor(base), bits).tolist()
    assert found == pytest.approx(values, rel=1e-6)
    for x, code in zip(weights(300).tolist(), quantizer(bits, base).codes(weights(300)).tolist(), strict=True):
        exact = 1e9 if x == 0 else -math.log2(x) * STEPS / base
        if exact - math.floor(exact) != pytest.approx(0.5, abs=1e-4):  # float32 decides a tie
            assert code == min(round(exact), 2**bits - 1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_of_37_steps_it_is_the_grid_of_base_two(bits):
    x = weights()
    grid = quantizer(bits, STEPS)
    assert torch.equal(grid.codes(x), log_codes(x, bits))
    assert torch.equal(grid(x), log_decode(log_codes(x, bits), bits))


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("minimum", [0.0, -0.17])
def test_there_are_as_many_values_as_codes_and_zero_is_one_of_them(bits, minimum):
    grid = quantizer(bits, 23 if bits < 6 else 7, scale=2.5, minimum=minimum)
    values = grid.values()
    assert len(values) == len(values.unique()) == 2**bits
    assert float(values[-1]) == pytest.approx(minimum)
    assert float(values[0]) == pytest.approx(2.5 + minimum)
    x = torch.linspace(minimum, 3, 5000)
    assert set(grid(x).tolist()) <= set(values.tolist())


def test_masked_positions_keep_no_weight():
    masked = torch.randn(5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf).softmax(-1)
    assert bool((quantizer(4, 20)(masked)[masked == 0] == 0).all())


def test_the_shift_is_a_bias_of_the_reader():
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(6, 4), torch.nn.functional.gelu(torch.randn(50, 6))
    minimum = float(x.min())
    grid, codes_only = quantizer(4, 20, 3.0, minimum), quantizer(4, 20, 3.0)
    folded = layer.bias + minimum * layer.weight.sum(1)
    expected = torch.nn.functional.linear(codes_only.decode(grid.codes(x)), layer.weight, folded)
    torch.testing.assert_close(layer(grid(x)), expected, rtol=1e-5, atol=1e-5)


def test_gradients_pass_and_change_no_value():
    x = weights().requires_grad_()
    grid = quantizer(4, 29)
    rounded = grid(x)
    assert torch.equal(rounded.detach(), grid(x.detach()))
    rounded.sum().backward()
    assert bool((x.grad == 1).all())


def test_codes_of_logarithms_are_those_of_the_values():
    x, base = weights(), torch.tensor(41)
    assert torch.equal(adaptive_log_codes(x.log2(), base, 4), quantizer(4, 41).codes(x))


def test_a_positive_minimum_is_refused():
    with pytest.raises(ValueError, match=r"at most 0, got 0\.1"):
        AdaptiveLogQuantizer(4, 0.1)
