"""The search of one layer against plain loops in float64."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lit_clipq.calibration.observations import Observations, joined
from lit_clipq.errors import CalibrationError
from lit_clipq.functional.granularity import PerChannel, PerTensor
from lit_clipq.nn.attention import QKVLinear
from lit_clipq.nn.layout import ROWS
from lit_clipq.nn.matmul import MatMul
from lit_clipq.nn.modules import QConv2d, QLinear, QMatMul
from lit_clipq.nn.quantizer import TwinGeluQuantizer, TwinSoftmaxQuantizer, UniformQuantizer
from lit_clipq.nn.registry import layout_of
from lit_clipq.search.data import LayerData
from lit_clipq.search.grid import CandidateGrid
from lit_clipq.search.layer import LayerSearch, SearchOptions
from lit_clipq.search.sampling import patches_of
from lit_clipq.search.selection import linear_multipliers
from lit_clipq.stages.bias_correction import channel_errors

CPU = torch.device("cpu")
COUNT = 25
PLAIN = {"exhaustive": True, "factored": False, "grid": CandidateGrid(count=COUNT)}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def weight_grid(bits, granularity=None):
    return UniformQuantizer(bits, symmetric=True, granularity=granularity or PerChannel(0))


def make_linear(bits, *, granularity=None, bias=True, rows=24, segments=()):
    torch.manual_seed(0)
    original = QKVLinear(5, segments) if segments else nn.Linear(5, 6, bias=bias)
    original.weight.data *= torch.linspace(0.5, 3, len(original.weight))[:, None]
    layer = QLinear(original, weight_grid(bits, granularity), UniformQuantizer(bits, symmetric=False))
    x = torch.randn(rows, 5, generator=generator()) ** 3 + 0.2
    return layer, (x,), torch.rand(rows, len(original.weight), generator=generator(1)) ** 4


def make_conv(bits):
    torch.manual_seed(0)
    original = nn.Conv2d(2, 3, 2, stride=2, padding=1)
    layer = QConv2d(original, weight_grid(bits), UniformQuantizer(bits, symmetric=False))
    x = torch.randn(6, 2, 4, 4, generator=generator())
    return layer, (x,), torch.rand(original(x).shape, generator=generator(1))


def make_matmul(bits):
    layer = QMatMul(MatMul(), UniformQuantizer(bits, symmetric=False), UniformQuantizer(bits, symmetric=False))
    a, b = torch.randn(8, 3, 4, generator=generator()), torch.randn(8, 4, 5, generator=generator(2)).exp()
    return layer, (a, b), torch.rand(8, 3, 5, generator=generator(1))


MAKERS = {"linear": make_linear, "conv": make_conv, "matmul": make_matmul}


def observed(layer, inputs, weight, parts=1):
    """What the layer saw, in so many calls."""
    keys = torch.arange(len(inputs[0]))
    chunks = zip(*(x.chunk(parts) for x in (*inputs, keys, weight)), strict=True)
    return [Observations(layout_of(layer), tuple(chunk[:-2]), chunk[-2], chunk[-1]) for chunk in chunks]


def search_on(layer, seen, **options):
    return LayerSearch(LayerData("here", layer, joined(seen), CPU), SearchOptions(**options))


def search_of(layer, inputs, weight, parts=1, **options):
    return search_on(layer, observed(layer, inputs, weight, parts), **options)


class Oracle:
    """Loops over rounds, operands, candidates and channels, everything in float64 and rounded by hand."""

    def __init__(self, layer, inputs, weight, bits, distance="hessian", segments=None):
        self.inputs, self.squares, self.distance = [x.double() for x in inputs], weight.double(), distance
        self.bits = bits
        self.module = layer
        self.weight = None if isinstance(layer, QMatMul) else layer.weight.detach().double()
        self.segments = segments
        self.target = self.product(self.inputs, self.weight)
        self.factors = linear_multipliers(COUNT).double()
        self.operands = [*(["weight"] if self.weight is not None else []), *range(len(inputs))]
        start = int((self.factors - 1).abs().argmin())
        self.chosen = {o: [start] * (len(self.groups()) if o == "weight" else 1) for o in self.operands}

    def groups(self):
        if self.segments is None:
            return [[channel] for channel in range(len(self.weight))]
        return [part.tolist() for part in torch.arange(len(self.weight)).split(self.segments)]

    def product(self, inputs, weight):
        if weight is None:
            return inputs[0] @ inputs[1]
        if weight.dim() == 4:
            bias = self.module.bias.detach().double()
            return F.conv2d(inputs[0], weight, bias, self.module.stride, self.module.padding)
        return F.linear(inputs[0], weight, None if self.module.bias is None else self.module.bias.detach().double())

    def rounded(self, operand, chosen):
        top = 2**self.bits - 1
        if operand == "weight":
            out = self.weight.clone()
            for group, index in zip(self.groups(), chosen, strict=True):
                block = self.weight[group]
                scale = 2 * block.abs().max() / top * self.factors[index]
                # The largest weight lies half a step outside of the min-max grid: a tie, decided by float32 rounding.
                codes = (block.float() * (1 / scale.float())).round().double()
                out[group] = codes.clamp(-(top // 2) - 1, top // 2) * scale
            return out
        x = self.inputs[operand]
        low, high = x.min().clamp(max=0), x.max().clamp(min=0)
        plain = (high - low) / top
        zero, scale = (-low / plain).round().clamp(0, top), plain * self.factors[chosen[0]]
        return ((x / scale).round() + zero).clamp(0, top).sub(zero) * scale

    def errors(self, chosen):
        rounded = {o: self.rounded(o, chosen[o]) for o in self.operands}
        output = self.product([rounded[i] for i in range(len(self.inputs))], rounded.get("weight"))
        error = output - self.target
        return {"hessian": error**2 * self.squares, "l2": error**2, "l1": error.abs()}[self.distance]

    def objective(self, chosen):
        return self.errors(chosen).sum().item()

    def search(self, rounds=3):
        axis = 1 if self.weight is not None and self.weight.dim() == 4 else -1
        for _ in range(rounds):
            for operand in self.operands:
                best = [float("inf")] * len(self.chosen[operand])
                found = list(self.chosen[operand])
                for candidate in range(COUNT):
                    errors = self.errors(self.chosen | {operand: [candidate] * len(found)})
                    by_channel = errors.movedim(axis, -1).reshape(-1, errors.shape[axis]).sum(0)
                    losses = (
                        [by_channel[group].sum() for group in self.groups()] if operand == "weight" else [errors.sum()]
                    )
                    for i, loss in enumerate(losses):
                        if loss < best[i] * (1 - 1e-9):
                            best[i], found[i] = loss.item(), candidate
                self.chosen[operand] = found
        return self.chosen


def indices(search):
    return {"weight" if n == "weight" else i: v.tolist() for i, (n, v) in enumerate(_named(search))}


def _named(search):
    chosen = search.problem.chosen
    names = [n for n in chosen if n != "weight"]
    return [(n, chosen[n]) for n in names] + [(n, v) for n, v in chosen.items() if n == "weight"]


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("distance", ["hessian", "l2", "l1"])
def test_the_full_grid_is_the_triple_loop(kind, bits, distance):
    layer, inputs, weight = MAKERS[kind](bits)
    oracle = Oracle(layer, inputs, weight, bits, distance)
    before = oracle.objective(oracle.chosen)
    expected = oracle.search()
    search = search_of(layer, inputs, weight, **PLAIN, distance=distance)
    result = search.run()
    assert indices(search) == expected
    assert result.before == pytest.approx(before, rel=1e-4)
    assert result.after == pytest.approx(oracle.objective(expected), rel=1e-4)


@pytest.mark.parametrize("segments", [(2, 2, 2), (3, 2, 1)])
def test_projections_that_share_a_product_have_a_scale_each(segments):
    layer, inputs, weight = make_linear(4, granularity=PerTensor(), segments=segments)
    expected = Oracle(layer, inputs, weight, 4, segments=segments).search()
    search = search_of(layer, inputs, weight, **PLAIN)
    search.run()
    assert search.problem.chosen["weight"].tolist() == expected["weight"]
    assert len(layer.weight_quantizer.scale.unique()) == 3
    for part in layer.weight_quantizer.scale.split(segments):
        assert len(part.unique()) == 1


def test_a_weight_per_tensor_has_one_scale():
    layer, inputs, weight = make_linear(4, granularity=PerTensor())
    expected = Oracle(layer, inputs, weight, 4, segments=(6,)).search()
    search = search_of(layer, inputs, weight, **PLAIN)
    search.run()
    assert search.problem.chosen["weight"].tolist() == expected["weight"]
    assert layer.weight_quantizer.scale.dim() == 0
    layer.freeze()
    assert layer(*inputs).isfinite().all()


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_the_search_comes_near_the_best_of_all_pairs_and_never_behind_the_start(kind, bits):
    layer, inputs, weight = MAKERS[kind](bits)
    oracle = Oracle(layer, inputs, weight, bits)
    before = oracle.objective(oracle.chosen)
    first, last = oracle.operands
    axis = 1 if kind == "conv" else -1
    everything = []  # for each candidate of the last operand, the best of the first: each channel by itself
    for x in range(COUNT):
        losses = []
        for w in range(COUNT):
            errors = oracle.errors({first: [w] * len(oracle.chosen[first]), last: [x]})
            channels = errors.movedim(axis, -1).reshape(-1, errors.shape[axis]).sum(0)
            losses.append(channels if first == "weight" else channels.sum(0, keepdim=True))
        everything.append(torch.stack(losses).amin(0).sum())
    best = torch.stack(everything).min().item()
    result = search_of(layer, inputs, weight, grid=CandidateGrid(count=COUNT), factored=False).run()
    assert result.after <= before * (1 + 1e-6)
    assert best * (1 - 1e-4) <= result.after <= 1.15 * best  # of 25 x 25 pairs, most of which are left out


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("options", [{}, PLAIN, {**PLAIN, "distance": "cosine"}], ids=["default", "full", "cosine"])
def test_one_chunk_or_several_give_the_same_grids(kind, options):
    found = []
    for parts in (1, 3):
        layer, inputs, weight = MAKERS[kind](4)
        result = search_of(layer, inputs, weight, parts, **options).run()
        found.append((layer.state_dict(), result.after))
    (state, after), (other, after_parts) = found
    assert after == pytest.approx(after_parts, rel=1e-6)
    assert all(torch.equal(state[name], other[name]) for name in state)


@pytest.mark.parametrize("distance", ["l2", "l1", "cosine"])
def test_other_distances_need_no_gradients_and_improve_on_min_max(distance):
    layer, inputs, weight = make_linear(3)
    seen = [Observations(ROWS, inputs, torch.arange(len(weight)))]
    result = search_on(layer, seen, distance=distance).run()
    assert result.after < result.before


def test_the_twin_grids_are_searched_as_well():
    soft = torch.randn(6, 4, 7, generator=generator()).mul(3).softmax(-1)
    layer = QMatMul(MatMul(), TwinSoftmaxQuantizer(4), UniformQuantizer(4, symmetric=False))
    v = torch.randn(6, 7, 3, generator=generator(1))
    result = search_of(layer, (soft, v), torch.ones(6, 4, 3)).run()
    assert result.after < result.before
    x = F.gelu(torch.randn(40, 5, generator=generator()) * 3)
    linear = nn.Linear(5, 4)
    layer = QLinear(linear, weight_grid(4), TwinGeluQuantizer(4, -0.16997))
    result = search_of(layer, (x,), torch.ones(40, 4)).run()
    assert result.after < result.before
    layer.freeze()
    signal, noise = linear(x).square().sum(), (layer(x) - linear(x)).square().sum()
    assert result.sqnr_db == pytest.approx((10 * torch.log10(signal / noise)).item(), abs=0.01)


def test_quality_and_mean_error_are_those_of_the_frozen_layer():
    layer, inputs, weight = make_linear(4)
    with torch.no_grad():
        exact = layer(*inputs)
    search = search_of(layer, inputs, weight, 2, factored=False)
    result = search.run()
    mean, squares = channel_errors(layer, LayerData("here", layer, joined(observed(layer, inputs, weight, 2)), CPU))
    layer.freeze()
    with torch.no_grad():
        error = layer(*inputs) - exact
    assert result.sqnr_db == pytest.approx(
        (10 * torch.log10(exact.square().sum() / error.square().sum())).item(), abs=0.01
    )
    torch.testing.assert_close(mean, error.mean(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(squares, error.double().square().mean(0), rtol=1e-4, atol=1e-9)
    assert result.after == pytest.approx((error.square() * weight).sum().item(), rel=1e-4)
    assert 0 <= result.clipped <= 1


def test_a_channel_that_nothing_depends_on_keeps_its_min_max_grid():
    layer, inputs, weight = make_linear(4)
    weight[:, 2] = 0  # dead behind a ReLU
    for options in ({}, PLAIN):
        search = search_of(layer, inputs, weight, **options)
        search.run()
        assert search.candidates["weight"].multipliers[search.problem.chosen["weight"][2]] == 1


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("parts", [1, 3])
def test_factored_weights_are_those_of_rows_times_those_of_channels(kind, parts):
    layer, inputs, weight = MAKERS[kind](4)
    search = search_of(layer, inputs, weight, parts)
    (seen,) = search.data
    rows, channels = weight.mean(1, keepdim=True), weight.movedim(1, -1).flatten(0, -2).mean(0)
    expected = rows * channels.view(-1, *[1] * (weight.dim() - 2)) / weight.mean()
    torch.testing.assert_close(seen.weight * search.unit, expected, rtol=1e-5, atol=0)  # float32 sums
    result = search.run()
    other, _, _ = MAKERS[kind](4)
    plain = search_of(other, inputs, expected, factored=False).run()
    assert result.after == pytest.approx(plain.after, rel=1e-4)


def test_products_of_activations_keep_a_weight_for_each_element():
    layer, inputs, weight = make_matmul(4)
    search = search_of(layer, inputs, weight)
    torch.testing.assert_close(search.data[0].weight * search.unit, weight, rtol=1e-6, atol=0)


def test_units_without_influence_count_for_the_range_only():
    layer, (x,), weight = make_linear(4)
    weight[::2] = 0
    x[0] = 500.0
    search = search_of(layer, (x,), weight, **PLAIN)
    search.run()
    other, _, _ = make_linear(4)
    kept = search_of(other, (x[1::2],), weight[1::2], **PLAIN)
    assert len(search.data[0].keys) == 12
    assert search.candidates["input"].scale > 5 * kept.candidates["input"].scale


def test_no_candidate_tracks_gradients():
    layer, inputs, weight = make_linear(4)
    with torch.enable_grad():
        search = search_of(layer, inputs, weight)
        search.run()
    assert not any(o.target.requires_grad for o in search.data)
    assert not layer.weight_quantizer.scale.requires_grad


def test_joining_empties_the_list_of_observations_so_that_nothing_is_held_twice():
    layer, inputs, weight = make_linear(4)
    seen = observed(layer, inputs, weight, 4)
    (whole,) = joined(seen)
    assert seen == []
    assert torch.equal(whole.inputs[0], inputs[0])
    assert torch.equal(whole.weight, weight)


def tensors_of(o):
    return [x for x in (*o.inputs, o.keys, o.weight, o.target, *(o.extremes or ())) if x is not None]


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize(
    "options",
    [{}, {"factored": False}, PLAIN, {"distance": "l2"}, {"distance": "cosine"}],
    ids=["default", "elements", "full", "l2", "cosine"],
)
def test_a_search_leaves_its_observations_untouched(kind, options):
    """So that searches of several widths share them, whatever each of them takes."""
    layer, inputs, weight = MAKERS[kind](4)
    weight[0] = 0  # units without influence are left out of the first part, the second one is taken as it is
    with torch.no_grad():
        target = layer.product(*inputs) + 0.1
    extremes = tuple(torch.stack([x.flatten(0, -2).amin(0) - 1, x.flatten(0, -2).amax(0) + 1]) for x in inputs)
    parts = zip(observed(layer, inputs, weight, 2), target.chunk(2), strict=True)
    seen = [replace(o, target=part, extremes=extremes) for o, part in parts]
    before = [[x.clone() for x in tensors_of(o)] for o in seen]
    own = {name: value.clone() for name, value in layer.named_parameters()}
    data = LayerData("here", layer, seen, CPU)
    first, second = (LayerSearch(data, SearchOptions(**options)).run() for _ in range(2))
    for o, tensors in zip(seen, before, strict=True):
        assert len(tensors) == 2 * len(inputs) + 3
        assert all(torch.equal(x, y) for x, y in zip(tensors_of(o), tensors, strict=True))
    assert all(torch.equal(value, own[name]) for name, value in layer.named_parameters())
    assert (first.before, first.after) == (second.before, second.after)


@pytest.mark.parametrize("kind", MAKERS)
def test_searches_that_share_observations_find_what_they_find_alone(kind):
    layer, inputs, weight = MAKERS[kind](4)
    shared = LayerData("here", layer, joined(observed(layer, inputs, weight, 2)), CPU)
    for options in ({}, {"factored": False}, {"distance": "l2"}):
        for bits in (8, 3):
            module, alone = MAKERS[kind](bits)[0], MAKERS[kind](bits)[0]
            result = LayerSearch(shared, SearchOptions(**options), module).run()
            expected = search_of(alone, inputs, weight, 2, **options).run()
            assert (result.before, result.after) == (expected.before, expected.after)
            state = alone.state_dict()
            assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


def test_bad_observations_are_errors_that_name_the_layer():
    layer, inputs, weight = make_linear(4)
    with pytest.raises(CalibrationError, match="layer here saw 0 calibration batches"):
        search_on(layer, [])
    with pytest.raises(CalibrationError, match="of here needs output gradients"):
        search_on(layer, [Observations(ROWS, inputs, torch.arange(24))])
    for bad in (float("nan"), float("inf")):
        broken = inputs[0].clone()
        broken[3, 2] = bad
        with pytest.raises(CalibrationError, match="layer here received NaN or Inf"):
            search_of(layer, (broken,), weight)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3},
        {"kernel_size": (3, 2), "stride": 2, "padding": (1, 0)},
        {"kernel_size": 3, "padding": "same", "dilation": 2},
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    ],
)
def test_patches_times_weights_are_the_convolution(options):
    layer = nn.Conv2d(2, 4, bias=False, **options)
    x = torch.randn(3, 2, 8, 7, generator=generator())
    expected = layer(x)
    product = layer.weight.flatten(1) @ patches_of(x, layer)
    torch.testing.assert_close(product.view(expected.shape), expected, rtol=1e-4, atol=1e-5)


def test_a_convolution_searched_by_patches_finds_what_a_linear_layer_does():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 4, stride=4)
    x = torch.randn(40, 3, 16, 16, generator=generator())
    weight = torch.rand(40, 8, 4, 4, generator=generator(1)) ** 3
    layer = QConv2d(conv, weight_grid(4), UniformQuantizer(4, symmetric=False))
    by_patches = search_of(layer, (x,), weight, factored=False).run()
    again = QConv2d(conv, weight_grid(4), UniformQuantizer(4, symmetric=False))
    in_full = search_of(again, (x,), weight, **{**PLAIN, "grid": CandidateGrid()}).run()
    assert by_patches.after < 1.01 * in_full.after


def test_grouped_convolutions_are_searched_without_patches():
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 4, 3, padding=1, groups=4)
    layer = QConv2d(conv, weight_grid(4), UniformQuantizer(4, symmetric=False))
    x = torch.randn(6, 4, 5, 5, generator=generator())
    result = search_of(layer, (x,), torch.rand(6, 4, 5, 5)).run()
    assert result.after < result.before


def test_one_operand_alone_is_searched():
    x, weight = torch.randn(30, 5, generator=generator()) ** 3, torch.rand(30, 4, generator=generator(1))
    for quantizers in ((weight_grid(3), None), (None, UniformQuantizer(3, symmetric=False))):
        result = search_of(QLinear(nn.Linear(5, 4), *quantizers), (x,), weight).run()
        assert result.after <= result.before
