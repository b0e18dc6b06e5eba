"""Grids with more than one parameter: what is offered, what a search takes, and that it is never worse."""

import copy
import itertools

import pytest
import torch
from torch import nn

from lit_clipq.functional.granularity import PerGroup, extrema
from lit_clipq.functional.uniform import fake_quantize
from lit_clipq.nn.adaptive_log import AdaptiveLogQuantizer
from lit_clipq.nn.matmul import MatMul
from lit_clipq.nn.modules import QLinear, QMatMul
from lit_clipq.nn.quantizer import TwinGeluQuantizer, TwinSoftmaxQuantizer, UniformQuantizer
from lit_clipq.search.chained import ZeroPoints
from lit_clipq.search.grid import CandidateGrid
from tests.search.test_layer import CPU, generator, make_linear, search_of

GRID = CandidateGrid(count=40)
MOVING = CandidateGrid(count=40, zero_points=True)


def affine(bits=4):
    return UniformQuantizer(bits, symmetric=False)


def grouped(rows=8, inputs=12, size=4, bits=4):
    torch.manual_seed(0)
    original = nn.Linear(inputs, rows)
    original.weight.data *= torch.tensor([0.1, 1.0, 5.0]).repeat_interleave(size)
    quantizer = UniformQuantizer(bits, symmetric=True, granularity=PerGroup(size))
    return QLinear(original, quantizer, affine(16))


def linear_data():
    x = torch.randn(64, 12, generator=generator()) * torch.tensor([10.0, 1.0, 0.2]).repeat_interleave(4)
    return (x,), torch.rand(64, 8, generator=generator(1)) ** 3


def objective(layer, inputs, weight):
    """The weighted squared error of a calibrated layer, in float64."""
    with torch.no_grad():
        wanted = layer.product(*(x.double() for x in inputs)) if isinstance(layer, QMatMul) else None
        rounded = [q(x) for q, x in zip(layer.operand_quantizers.values(), inputs, strict=True)]
        if wanted is not None:
            found = layer.product(*(x.double() for x in rounded))
        else:
            w, b = layer.weight.double(), layer.bias.double()
            wanted = nn.functional.linear(inputs[0].double(), w, b)
            found = nn.functional.linear(rounded[0].double(), layer.weight_quantizer(layer.weight).double(), b)
        return float((weight.double() * (found - wanted).square()).sum())


def test_candidates_of_groups_are_the_grids_of_the_quantizer_to_the_bit():
    layer = grouped()
    weight, quantizer = layer.weight.detach(), layer.weight_quantizer
    family = GRID.of(quantizer, *extrema(weight, quantizer.granularity), device=CPU)
    index = torch.randint(0, family.count, (3, 8), generator=generator(3))
    for step in range(4):
        rounded = family.apply(weight, index)
        for number in range(3):
            scale = family.scale_of(index[number])
            expected = fake_quantize(weight, scale, quantizer.zero_point, -8, 7, quantizer.granularity)
            assert torch.equal(rounded[number], expected)
            assert torch.equal(family.every(3).apply(weight[::3], index[:, ::3])[number], expected[::3])
        family = family.then(index[0])
        assert (family is None) == (step == 3)


def test_each_group_of_each_row_finds_the_factor_that_a_loop_finds():
    layer = grouped()
    (x,), weight = linear_data()
    grid = CandidateGrid(count=12, low=0.5, high=1.1)
    result = search_of(layer, (x,), weight, grid=grid, exhaustive=True, factored=False).run()
    assert result.after == pytest.approx(objective(layer, (x,), weight), rel=1e-4)
    scale = layer.weight_quantizer.scale
    ranges = extrema(layer.weight.detach(), PerGroup(4))
    family = grid.of(copy.deepcopy(layer.weight_quantizer), *ranges, device=CPU)
    last = family.scale.shape[1] - 1
    for row, number in itertools.product(range(8), range(family.count)):  # nothing improves the group searched last
        other = copy.deepcopy(layer)
        changed = scale.clone()
        changed[row, last] = family.scale[row, last] * family.multipliers[number]
        other.weight_quantizer.load_parameters(changed, layer.weight_quantizer.zero_point)
        assert objective(other, (x,), weight) >= result.after * (1 - 1e-5)


def test_groups_of_different_size_gain_by_scales_of_their_own():
    (x,), weight = linear_data()
    per_group = search_of(grouped(), (x,), weight, grid=GRID).run()
    row = grouped()
    row.weight_quantizer = UniformQuantizer(4, symmetric=True, granularity=PerGroup(12))
    assert per_group.after < 0.8 * search_of(row, (x,), weight, grid=GRID).run().after


def test_a_layer_with_groups_is_frozen_as_it_was_searched():
    layer = grouped()
    (x,), weight = linear_data()
    search_of(layer, (x,), weight, grid=GRID).run()
    expected = layer.weight_quantizer(layer.weight.detach())
    layer.freeze()
    assert torch.equal(layer.weight, expected)
    assert layer.weight_codes.shape == (8, 12)


def test_zero_points_are_offered_around_that_of_minimum_and_maximum_which_comes_first():
    quantizer = affine(4)
    family = MOVING.of(quantizer, torch.tensor(-1.0), torch.tensor(2.0), device=CPU)
    zeros = family.then(family.start)
    assert isinstance(zeros, ZeroPoints)
    assert zeros.zero_points.tolist() == [3, 4, 5, 6, 7]
    assert int(zeros.zero_points[zeros.start]) == 5
    x = torch.randn(50, generator=generator())
    for number, zero in enumerate(zeros.zero_points):
        expected = fake_quantize(x, family.scale_of(family.start), zero, 0, 15, quantizer.granularity)
        assert torch.equal(zeros.apply(x, torch.tensor([[number]]))[0], expected)
    assert zeros.then(zeros.start) is None
    moved = zeros.then(torch.tensor([0]))
    assert int(moved.zero_point) == 3
    assert moved.then(moved.start) is None


@pytest.mark.parametrize("exhaustive", [False, True])
def test_a_zero_point_that_suits_the_values_is_found_and_an_objective_is_never_worse(exhaustive):
    layer, _, weight = make_linear(4, rows=200)
    x = torch.randn(200, 5, generator=generator()).exp()
    x[0, 0] = -4.0  # one value that stretches the range to where no others are
    weight[0] = 0
    found = []
    for grid in (GRID, MOVING):
        module = copy.deepcopy(layer)
        found.append(search_of(module, (x,), weight, grid=grid, exhaustive=exhaustive, factored=False).run())
        assert found[-1].after == pytest.approx(objective(module, (x,), weight), rel=1e-3)
    assert found[1].after < found[0].after
    assert int(module.input_quantizers["input"].zero_point) < int(layer_zero(x))
    assert 0 <= found[1].clipped < 0.2


def layer_zero(x):
    quantizer = affine(4)
    quantizer.set_range(*x.aminmax())
    return quantizer.zero_point


def make_average(quantizer):
    layer = QMatMul(MatMul(), quantizer, affine(8))
    a = (4 * torch.randn(16, 6, 10, generator=generator())).softmax(-1)
    return layer, (a, torch.randn(16, 10, 5, generator=generator(2))), torch.rand(16, 6, 5, generator=generator(1))


def test_base_and_scale_come_near_the_best_of_all_pairs():
    layer, inputs, weight = make_average(AdaptiveLogQuantizer(3))
    result = search_of(layer, inputs, weight, grid=GRID).run()
    assert result.after == pytest.approx(objective(layer, inputs, weight), rel=1e-3)
    grid, values = layer.input_quantizers["a"], []
    top = inputs[0].max()
    for base, phase in itertools.product(range(1, 138, 4), range(-8, 3)):
        other = copy.deepcopy(layer)
        other.input_quantizers["a"].base = torch.tensor(base)
        other.input_quantizers["a"].scale = top * 2 ** (phase / 8)
        values.append(objective(other, inputs, weight))
    assert 1 <= int(grid.base) <= 137
    assert result.after <= 1.1 * min(values)


def test_of_rivals_the_one_that_serves_is_taken():
    layer, inputs, weight = make_average(TwinSoftmaxQuantizer(3))
    twin = search_of(copy.deepcopy(layer), inputs, weight, grid=GRID).run()
    layer.rivals = {"a": AdaptiveLogQuantizer(3)}
    both = search_of(layer, inputs, weight, grid=GRID).run()
    assert both.after <= twin.after
    assert both.after == pytest.approx(objective(layer, inputs, weight), rel=1e-3)
    taken = layer.input_quantizers["a"]
    assert isinstance(taken, AdaptiveLogQuantizer) == (both.after < twin.after)
    assert taken.calibrated


def test_a_rival_that_is_worse_is_left():
    layer, _, weight = make_linear(8, rows=100)
    layer.input_quantizers["input"] = TwinGeluQuantizer(8, -0.17)
    layer.rivals = {"input": AdaptiveLogQuantizer(8, -0.17)}
    steps = torch.arange(100 * 5) % 256  # the values of a uniform grid, which a logarithmic one has not
    x = torch.where(steps < 128, -0.17 * steps / 128, (steps - 128) / 127 * 4.0).view(100, 5)
    search_of(layer, (x,), weight, grid=GRID).run()
    assert isinstance(layer.input_quantizers["input"], TwinGeluQuantizer)
    assert layer.input_quantizers["input"].calibrated
