"""One shared tester over every kind of quantizable layer."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from lit_clipq.errors import ConfigError
from lit_clipq.functional.granularity import PerChannel, PerToken, extrema
from lit_clipq.nn.matmul import MatMul
from lit_clipq.nn.modules import Phase, QModule, QWeighted
from lit_clipq.nn.quantizer import UniformQuantizer
from lit_clipq.nn.registry import KINDS, kind_of, register_kind
from lit_clipq.nn.size import stored_bytes

CASES = {
    "linear": (lambda: nn.Linear(8, 5), [(4, 3, 8)], 4 * 3 * 8 * 5),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), [(2, 4, 8, 8)], 2 * 6 * 4 * 4 * 2 * 9),
    "matmul": (lambda: MatMul(), [(2, 3, 4, 5), (2, 3, 5, 6)], 2 * 3 * 4 * 5 * 6),
    "embedding": (lambda: nn.Embedding(9, 8), [(2, 5)], 0),
}


def make(name, weight_bits=8, activation_bits=8):
    torch.manual_seed(0)
    build, shapes, macs = CASES[name]
    original = build()
    kind = kind_of(original)
    weight = UniformQuantizer(weight_bits, symmetric=True, granularity=PerChannel(0)) if weight_bits else None
    operands = [
        UniformQuantizer(activation_bits, symmetric=False) if activation_bits else None for _ in range(kind.operands)
    ]
    layer = kind.quantized_type(original, *([weight] if kind.has_weight else []), *operands)
    inputs = [torch.randn(shape) if kind.operands else torch.randint(9, shape) for shape in shapes]
    return original, layer, inputs, kind, macs


def calibrate(layer: QModule, inputs):
    for quantizer, x in zip(layer.input_quantizers.values(), inputs, strict=False):
        quantizer.set_range(*x.aminmax())
    if isinstance(layer, QWeighted) and layer.weight_quantizer is not None:
        layer.weight_quantizer.set_range(*extrema(layer.weight.detach(), layer.weight_quantizer.granularity))
    layer.freeze()


def test_every_registered_kind_is_covered():
    assert {kind.name for kind in KINDS} == set(CASES)


@pytest.mark.parametrize(("name", "float_type"), [("linear", nn.Bilinear), ("bilinear", nn.Linear)])
def test_a_kind_that_meets_an_earlier_one_is_refused(name, float_type):
    before = list(KINDS)
    with pytest.raises(ConfigError, match=f"'{name}' for {float_type.__name__} meets the kind 'linear' for Linear"):
        register_kind(replace(KINDS[0], name=name, float_type=float_type))
    assert before == KINDS


@pytest.mark.parametrize("name", CASES)
def test_a_layer_that_is_not_frozen_computes_the_float_bits(name):
    original, layer, inputs, _, _ = make(name)
    assert layer.phase is Phase.FLOAT
    assert torch.equal(layer(*inputs), original(*inputs))


@pytest.mark.parametrize("name", CASES)
def test_multiply_accumulates_are_counted(name):
    original, _, inputs, kind, macs = make(name)
    assert kind.macs(original, tuple(inputs), original(*inputs)) == macs


@pytest.mark.parametrize("name", CASES)
def test_a_frozen_layer_is_the_float_product_of_rounded_operands(name):
    original, layer, inputs, kind, _ = make(name)
    expected_layer = copy.deepcopy(original)
    calibrate(layer, inputs)
    assert len(layer.input_quantizers) == kind.operands
    rounded = [q(x) for q, x in zip(layer.input_quantizers.values(), inputs, strict=True)] if kind.operands else inputs
    if kind.has_weight:
        expected_layer.weight.data = layer.weight_quantizer(original.weight.detach())
    assert torch.equal(layer(*inputs), expected_layer(*rounded))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("bits", "floor"), [(16, 70.0), (8, 30.0), (4, 8.0)])
def test_signal_to_noise_stays_above_its_floor(name, bits, floor):
    original, layer, inputs, _, _ = make(name, bits, bits)
    expected = original(*inputs)
    calibrate(layer, inputs)
    noise = layer(*inputs) - expected
    assert 10 * torch.log10(expected.square().mean() / noise.square().mean()) > floor


@pytest.mark.parametrize("name", ["linear", "conv2d"])
@pytest.mark.parametrize(("bits", "dtype"), [(4, torch.int8), (8, torch.int8), (16, torch.int16)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_are_the_state_and_restore_the_weight(name, bits, dtype, symmetric):
    original, layer, inputs, _, _ = make(name)
    layer.weight_quantizer = UniformQuantizer(bits, symmetric=symmetric, granularity=PerChannel(0))
    calibrate(layer, inputs)
    state = layer.state_dict()
    assert "weight" not in state
    assert state["weight_codes"].dtype == dtype
    weight = layer.weight.clone()
    layer.load_codes(state["weight_codes"])
    assert torch.equal(layer.weight, weight)
    step = layer.weight_quantizer.scale.view(-1, *[1] * (weight.dim() - 1))
    assert ((weight - original.weight).abs() <= step * 1.01).all()


def test_packed_size_counts_bits():
    _, layer, inputs, _, _ = make("linear", weight_bits=4)
    before = stored_bytes(layer)
    assert before == (8 * 5 + 5) * 4
    calibrate(layer, inputs)
    grids = 5 * (4 + 4) + (4 + 4)
    assert stored_bytes(layer) == 8 * 5 // 2 + 5 * 4 + grids


def test_weight_only_and_activation_only_layers_leave_the_other_operand_alone():
    original, layer, inputs, _, _ = make("linear", weight_bits=None)
    calibrate(layer, inputs)
    assert layer.weight is original.weight
    _, layer, inputs, _, _ = make("linear", activation_bits=None)
    calibrate(layer, inputs)
    assert torch.equal(layer(inputs[0]), nn.functional.linear(inputs[0], layer.weight, layer.bias))


def test_token_grids_follow_the_input():
    quantizer = UniformQuantizer(8, symmetric=False, granularity=PerToken())
    x = torch.randn(4, 16)
    assert quantizer.calibrated
    assert torch.allclose(quantizer(x * 1000), quantizer(x) * 1000, rtol=1e-4)


def test_an_uncalibrated_quantizer_says_so():
    _, layer, inputs, _, _ = make("linear", weight_bits=None)
    layer.freeze()
    with pytest.raises(RuntimeError, match="calibrate it before"):
        layer(*inputs)


@pytest.mark.parametrize("name", CASES)
def test_a_frozen_layer_survives_deepcopy(name):
    _, layer, inputs, _, _ = make(name)
    calibrate(layer, inputs)
    assert torch.equal(copy.deepcopy(layer)(*inputs), layer(*inputs))
