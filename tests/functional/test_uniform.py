"""Uniform grids against scalar arithmetic written from the definition."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_clipq.functional.granularity import PerChannel, PerGroup, PerTensor, PerToken, extrema
from lit_clipq.functional.uniform import affine_parameters, code_range, fake_quantize, from_codes, to_codes


def scalar_round_trip(x: float, scale: float, zero: int, qmin: int, qmax: int) -> float:
    """Definition of the grid for one number, in float64."""
    code = max(qmin, min(qmax, round(x / scale) + zero))
    return scale * (code - zero)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8, 12, 16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_values_follow_the_definition(bits, symmetric):
    x = torch.randn(200, generator=torch.Generator().manual_seed(bits)) + 0.3
    scale, zero = affine_parameters(*x.aminmax(), bits, symmetric=symmetric)
    qmin, qmax = code_range(bits, symmetric=symmetric)
    expected = [scalar_round_trip(v, scale.item(), zero.item(), qmin, qmax) for v in x.tolist()]
    actual = fake_quantize(x, scale, zero, qmin, qmax, PerTensor())
    # a value within float32's rounding of a tie may take either neighbour
    off = (actual.double() - torch.tensor(expected, dtype=torch.float64)).abs()
    assert (off > 0.01 * scale).sum() <= 1
    assert off.max() <= 1.01 * scale


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    "granularity", [PerTensor(), PerChannel(0), PerChannel(1), PerChannel(-1), PerToken(), PerGroup(4)]
)
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_codes_stay_inside_and_decode_to_the_same_bits(bits, symmetric, granularity):
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)) * 3
    scale, zero = affine_parameters(*extrema(x, granularity), bits, symmetric=symmetric)
    qmin, qmax = code_range(bits, symmetric=symmetric)
    rounded = fake_quantize(x, scale, zero, qmin, qmax, granularity)
    codes = to_codes(x, scale, zero, qmin, qmax, granularity)
    assert codes.dtype == torch.int32
    assert codes.min() >= qmin
    assert codes.max() <= qmax
    assert torch.equal(from_codes(codes, scale, zero, granularity), rounded)
    assert torch.equal(fake_quantize(rounded, scale, zero, qmin, qmax, granularity), rounded), "not idempotent"


@pytest.mark.parametrize("granularity", [PerChannel(0), PerToken(), PerGroup(4)])
def test_finer_grids_equal_tensor_grids_of_their_parts(granularity):
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    scale, zero = affine_parameters(*extrema(x, granularity), 4, symmetric=False)
    whole = fake_quantize(x, scale, zero, 0, 15, granularity)
    size = 4 if isinstance(granularity, PerGroup) else 8
    for part, rounded in zip(x.reshape(-1, size), whole.reshape(-1, size), strict=True):
        one = affine_parameters(*part.aminmax(), 4, symmetric=False)
        assert torch.equal(fake_quantize(part, *one, 0, 15, PerTensor()), rounded)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=20),
    st.integers(2, 16),
    st.booleans(),
)
def test_error_is_half_a_step_where_nothing_clips(values, bits, symmetric):
    x = torch.tensor(values)
    scale, zero = affine_parameters(*x.aminmax(), bits, symmetric=symmetric, restricted=True)
    qmin, qmax = code_range(bits, symmetric=symmetric)
    rounded = fake_quantize(x, scale, zero, qmin, qmax, PerTensor())
    codes = to_codes(x, scale, zero, qmin, qmax, PerTensor())
    inside = (codes > qmin) & (codes < qmax)
    assert ((rounded - x).abs()[inside] <= scale * 0.5 * (1 + 2**-7)).all()
    # affine: rounding the zero point may shift either end by half a step
    assert ((rounded - x).abs() <= scale * 1.01).all()


@pytest.mark.parametrize(("low", "high"), [(0.5, 2.0), (-3.0, -1.0)])
def test_zero_is_always_exact(low, high):
    scale, zero = affine_parameters(torch.tensor(low), torch.tensor(high), 4, symmetric=False)
    assert fake_quantize(torch.zeros(3), scale, zero, 0, 15, PerTensor()).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0), PerChannel(1), PerToken(), PerGroup(50)])
def test_fused_and_in_place_paths_give_the_same_bits(granularity, symmetric):
    x = torch.randn(100, 100, generator=torch.Generator().manual_seed(2))
    scale, zero = affine_parameters(*extrema(x, granularity), 5, symmetric=symmetric)
    qmin, qmax = code_range(5, symmetric=symmetric)
    fused = fake_quantize(x.clone().requires_grad_(), scale, zero, qmin, qmax, granularity)
    assert fused.grad_fn is not None
    assert torch.equal(fused, fake_quantize(x, scale, zero, qmin, qmax, granularity))


def test_gradient_passes_inside_the_range_only():
    x = torch.tensor([-9.0, -0.4, 0.4, 9.0], requires_grad=True)
    fake_quantize(x, torch.tensor(0.5), torch.tensor(8, dtype=torch.int32), 0, 15, PerTensor()).sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 0.0]


def test_the_largest_weight_clips_half_a_step_unless_restricted():
    high = torch.tensor(3.0)
    scale, zero = affine_parameters(-high, high, 2, symmetric=True)
    assert fake_quantize(high, scale, zero, -2, 1, PerTensor()).item() == pytest.approx(2.0)
    scale, zero = affine_parameters(-high, high, 2, symmetric=True, restricted=True)
    assert fake_quantize(high, scale, zero, -2, 1, PerTensor()).item() == 3.0


@pytest.mark.parametrize("bound", [0.0, 1e-44, 1e-38])
def test_an_empty_range_becomes_zero(bound):
    scale, zero = affine_parameters(torch.tensor(-bound), torch.tensor(bound), 8, symmetric=True)
    assert math.isfinite(1 / scale.item())
    assert fake_quantize(torch.tensor([bound]), scale, zero, -128, 127, PerTensor()).item() == pytest.approx(
        0, abs=1e-38
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_ranges_that_are_not_finite_are_refused(bad):
    with pytest.raises(ValueError, match="finite"):
        affine_parameters(torch.tensor(bad), torch.tensor(1.0), 8, symmetric=False)


@pytest.mark.parametrize("bits", [0, 1, 17, 32])
def test_widths_without_a_grid_are_refused(bits):
    with pytest.raises(ValueError, match="2 to 16"):
        code_range(bits, symmetric=True)


def test_a_group_must_divide_the_axis():
    with pytest.raises(ValueError, match="does not divide"):
        extrema(torch.zeros(2, 10), PerGroup(4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_type(dtype):
    x = torch.randn(16, generator=torch.Generator().manual_seed(3)).to(dtype)
    scale, zero = affine_parameters(*x.aminmax(), 8, symmetric=False)
    assert fake_quantize(x, scale, zero, 0, 255, PerTensor()).dtype == dtype
