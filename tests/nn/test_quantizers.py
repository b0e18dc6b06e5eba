"""One shared tester over every grid: what layers and saved models rely on, whatever the values are."""

from collections.abc import Iterator

import pytest
import torch

import lit_clipq.recipes  # noqa: F401 - brings every grid that a recipe can choose
from lit_clipq.functional.granularity import PerChannel, extrema
from lit_clipq.nn.adaptive_log import AdaptiveLogQuantizer
from lit_clipq.nn.quantizer import (
    LogQuantizer,
    Quantizer,
    TwinGeluQuantizer,
    TwinSoftmaxQuantizer,
    UniformQuantizer,
)

BITS = (2, 3, 4, 8, 16)


def values() -> torch.Tensor:
    return torch.randn(5, 40, generator=torch.Generator().manual_seed(0))


def uniform(bits):
    quantizer = UniformQuantizer(bits, symmetric=False, granularity=PerChannel(0))
    quantizer.set_range(*extrema(values(), quantizer.granularity))
    return quantizer, values(), (0, 2**bits - 1)


def uniform_symmetric(bits):
    quantizer = UniformQuantizer(bits, symmetric=True)
    quantizer.set_range(*values().aminmax())
    return quantizer, values(), (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def twin_softmax(bits):
    quantizer = TwinSoftmaxQuantizer(bits)
    quantizer.split = torch.tensor(2.0**-6)
    return quantizer, values().softmax(-1), (0, 2**bits - 1)


def twin_gelu(bits):
    gelu = torch.nn.functional.gelu(values())
    quantizer = TwinGeluQuantizer(bits, minimum=float(gelu.min()))
    quantizer.positive_step = gelu.max() / (2 ** (bits - 1) - 1)
    return quantizer, gelu, (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def log(bits):
    return LogQuantizer(bits, steps_per_octave=2), values().softmax(-1), (0, 2**bits - 1)


def adaptive_log(bits):
    gelu = torch.nn.functional.gelu(values())
    quantizer = AdaptiveLogQuantizer(bits, minimum=float(gelu.min()))
    quantizer.base, quantizer.scale = torch.tensor(29 if bits < 8 else 3), gelu.max() - gelu.min()
    return quantizer, gelu, (0, 2**bits - 1)


CASES = {f.__name__: f for f in (uniform, uniform_symmetric, twin_softmax, twin_gelu, log, adaptive_log)}


def grids(kind: type[Quantizer] = Quantizer) -> Iterator[type[Quantizer]]:
    for below in kind.__subclasses__():
        yield below
        yield from grids(below)


def test_every_grid_of_the_package_is_covered():
    of_the_package = {grid for grid in grids() if grid.__module__.startswith("lit_clipq.")}
    assert {type(make(4)[0]) for make in CASES.values()} == of_the_package


EVERY = pytest.mark.parametrize("make", CASES.values(), ids=CASES)
AT_EVERY_WIDTH = pytest.mark.parametrize("bits", BITS)


@EVERY
@AT_EVERY_WIDTH
def test_codes_fit_their_width_and_decode_to_what_the_forward_gives(make, bits):
    quantizer, x, (least, most) = make(bits)
    codes = quantizer.codes(x)
    assert (codes.dtype, codes.shape) == (torch.int32, x.shape)
    assert least <= int(codes.min())
    assert int(codes.max()) <= most
    assert torch.equal(quantizer.decode(codes), quantizer(x))


@EVERY
@AT_EVERY_WIDTH
def test_rounding_twice_changes_nothing(make, bits):
    quantizer, x, _ = make(bits)
    once = quantizer(x)
    if isinstance(quantizer, TwinSoftmaxQuantizer):  # the largest value below the split is the split, which lies above
        once = once[once != quantizer.split]
    assert torch.equal(quantizer(once), once)


@EVERY
@AT_EVERY_WIDTH
def test_no_width_has_more_values_than_codes(make, bits):
    quantizer, x, _ = make(bits)
    rows = quantizer(x) if isinstance(quantizer.granularity, PerChannel) else quantizer(x).reshape(1, -1)
    assert all(len(row.unique()) <= 2**bits for row in rows)


@EVERY
def test_more_bits_are_nearer(make):
    errors = []
    for bits in (3, 5, 8):
        quantizer, x, _ = make(bits)
        errors.append(float((quantizer(x) - x).square().mean()))
    assert errors == sorted(errors, reverse=True)


@EVERY
def test_options_and_buffers_are_all_there_is_to_keep(make):
    quantizer, x, _ = make(4)
    again = Quantizer.from_config(quantizer.config())
    assert type(again) is type(quantizer)
    assert again.config() == quantizer.config()
    for name, value in quantizer.state_dict().items():
        assert not again.calibrated
        setattr(again, name, value)
    for name, value in quantizer.state_dict().items():
        setattr(again, name, value)
    assert again.calibrated
    assert torch.equal(again(x), quantizer(x))


@EVERY
def test_a_grid_without_its_parameters_says_so(make):
    quantizer, x, _ = make(4)
    empty = Quantizer.from_config(quantizer.config())
    if empty.calibrated:
        assert not quantizer.state_dict()  # it has none
    else:
        with pytest.raises(RuntimeError, match="calibrate it before"):
            empty(x)


@EVERY
def test_half_precision_stays_half_precision(make):
    quantizer, x, _ = make(8)
    rounded = quantizer(x.bfloat16())
    assert (rounded.dtype, rounded.shape) == (torch.bfloat16, x.shape)
