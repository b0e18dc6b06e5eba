"""Stages that fit weights: against numpy on one layer, and as parts of recipes on the mini models."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lit_clipq import load_quantized, quantize, quantize_many, save_quantized
from lit_clipq.api import preview
from lit_clipq.calibration.observations import Observations
from lit_clipq.checkpoint import identify
from lit_clipq.errors import ConfigError
from lit_clipq.functional.granularity import PerChannel, PerGroup, PerTensor
from lit_clipq.models import load_clip
from lit_clipq.nn.modules import QConv2d, QLinear
from lit_clipq.nn.quantizer import UniformQuantizer
from lit_clipq.nn.registry import layout_of
from lit_clipq.recipes import BitWidths, compose
from lit_clipq.search.data import LayerData
from lit_clipq.search.gram import as_matrix, gram_of
from lit_clipq.stages.affine import Affine
from lit_clipq.stages.erq import Erq
from lit_clipq.stages.gptq import Gptaq, Gptq, row_costs
from lit_clipq.stages.weights import ElementGrid
from tests.ddp.processes import run_processes

CPU = torch.device("cpu")
LINEAR, CONV, GROUPED = "linear", "conv", "grouped"


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def layer_and_input(kind, granularity=None, symmetric=True):
    """A layer with its grids, and correlated, clipped inputs for it."""
    torch.manual_seed(0)
    if kind == LINEAR:
        original, x = nn.Linear(24, 10), torch.randn(300, 24, generator=generator(1)).cumsum(1) / 3
        kind_of_layer = QLinear
    else:
        groups = 1 if kind == CONV else 4
        original = nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=groups, bias=kind == CONV)
        x = torch.randn(20, 8, 9, 9, generator=generator(1)).cumsum(1) / 2
        kind_of_layer = QConv2d
    weight = UniformQuantizer(3, symmetric=symmetric, granularity=granularity or PerChannel(0))
    layer = kind_of_layer(original, weight, UniformQuantizer(4, symmetric=False))
    spread = layer.weight.detach()
    shape = (len(spread), -1, granularity.size) if isinstance(granularity, PerGroup) else (len(spread), -1)
    low, high = spread.reshape(shape).aminmax(dim=-1, keepdim=isinstance(granularity, PerGroup))
    weight.set_range(*((low.min(), high.max()) if isinstance(granularity, PerTensor) else (low, high)))
    layer.input_quantizers["input"].set_range(x.min() * 0.7, x.max() * 0.7)
    return layer, x


def data_of(layer, x, weight=None, target=None):
    keys = torch.arange(len(x)) * 2**24
    return LayerData("here", layer, [Observations(layout_of(layer), (x,), keys, weight, target)], CPU)


class Task:
    name = "here"

    def __init__(self):
        self.structure = []


def rows(layer, x):
    """Rounded inputs as rows (G, N, d), unfolded by torch alone."""
    x = layer.input_quantizers["input"](x)
    if isinstance(layer, QLinear):
        return x[None]
    pieces = [
        F.unfold(part, layer.kernel_size, layer.dilation, layer.padding, layer.stride).mT.flatten(0, 1)
        for part in x.chunk(layer.groups, dim=1)
    ]
    return torch.stack(pieces)


def naive_gptq(weight, hessian, scale, low, high, order):
    """Column by column in float64, the inverse by elimination; weight (R, d)."""
    weight, inverse, steps = weight.copy(), np.linalg.inv(hessian), np.zeros_like(weight)
    for i in order:
        steps[:, i] = np.clip(np.round(weight[:, i] / scale[:, i]), low, high)
        weight -= np.outer((weight[:, i] - scale[:, i] * steps[:, i]) / inverse[i, i], inverse[i])
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return steps


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("kind", [LINEAR, CONV, GROUPED])
def test_gptq_rounds_as_the_published_procedure(kind, weighted, act_order):
    layer, x = layer_and_input(kind)
    exact = layer(x).detach()
    g = torch.rand(exact.shape, generator=generator(5)) ** 3
    data, stage = data_of(layer, x, g), Gptq(weighted=weighted, act_order=act_order)
    gram, weight, grid = (
        stage.gram(layer, data),
        as_matrix(layer, layer.weight.detach().double()),
        ElementGrid.of(layer),
    )
    steps, failed, _ = stage.round(weight, grid, gram)
    assert not failed.any()
    inputs = rows(layer, x).double()
    if weighted:
        by_channel = g.sum([d for d in range(g.dim()) if d != 1])
        factored = g.mean(1, keepdim=True) * (by_channel / by_channel.mean()).view(-1, *[1] * (g.dim() - 2))
        cost = factored.movedim(1, -1).reshape(-1, len(inputs), len(weight[0])).mean(-1).T
    for group in range(len(inputs)):
        rated = inputs[group] * (cost[group, :, None] if weighted else 1)
        hessian = (inputs[group].T @ rated).double().numpy()
        order = np.argsort(-np.diag(hessian), kind="stable") if act_order else range(len(hessian))
        hessian = hessian + 0.01 * np.diag(hessian).mean() * np.eye(len(hessian))
        expected = naive_gptq(weight[group].numpy(), hessian, grid.scale[group].numpy(), -4, 3, order)
        assert (steps[group].numpy() == expected).mean() > 0.99  # float32 weights of errors may move a tie


@pytest.mark.parametrize("kind", [LINEAR, CONV, GROUPED])
@pytest.mark.parametrize("stage", [Gptq(), Gptaq(strength=1.0)])
def test_no_row_is_worse_than_rounded_to_nearest_and_freezing_changes_nothing(kind, stage):
    layer, x = layer_and_input(kind)
    data, old = data_of(layer, x), layer.weight
    kept = old.detach().clone()
    exact = as_matrix(layer, kept.double())
    gram = stage.gram(layer, data)
    nearest = as_matrix(layer, layer.weight_quantizer(kept))
    stage.improve(Task(), layer, data)
    assert layer.weight is not old
    assert torch.equal(old, kept)  # the float layer's own
    new = as_matrix(layer, layer.weight.detach())
    better = row_costs(exact, nearest, gram) - row_costs(exact, new, gram)
    assert (better >= 0).all()
    assert (better > 0).any()
    assert torch.equal(layer.weight_quantizer(layer.weight.detach()), layer.weight)
    rounded = layer.weight.detach().clone()
    layer.freeze()
    assert torch.equal(layer.weight, rounded)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", [PerChannel(0), PerTensor(), PerGroup(8)])
def test_scales_of_any_granularity_stay_as_they_are(granularity, symmetric):
    layer, x = layer_and_input(LINEAR, granularity=granularity, symmetric=symmetric)
    scale = layer.weight_quantizer.scale.clone()
    grid = ElementGrid.of(layer)
    rounded = layer.weight_quantizer(layer.weight.detach())
    assert torch.equal(grid.values(grid.nearest(as_matrix(layer, rounded).double()))[0], rounded)
    Gptq().improve(Task(), layer, data_of(layer, x))
    assert torch.equal(layer.weight_quantizer.scale, scale)
    assert torch.equal(layer.weight_quantizer(layer.weight.detach()), layer.weight)


def test_an_input_that_is_exact_makes_gptaq_gptq():
    layers = []
    for stage in (Gptq(), Gptaq()):
        layer, x = layer_and_input(LINEAR)
        x = layer.input_quantizers["input"](x)  # on the grid: rounding changes nothing
        stage.improve(Task(), layer, data_of(layer, x))
        layers.append(layer)
    assert torch.equal(layers[0].weight, layers[1].weight)


def test_what_has_no_factor_is_rounded_to_nearest_and_told():
    layer, x = layer_and_input(LINEAR)
    data = data_of(layer, x)
    stage = Gptq()
    gram = stage.gram(layer, data)
    gram.hessian[0, 3, 3] = -1e9
    nearest = layer.weight_quantizer(layer.weight.detach())
    object.__setattr__(stage, "gram", lambda *_: gram)
    assert "no Cholesky factor" in stage.improve(Task(), layer, data)["reason"]
    assert torch.equal(layer.weight, nearest)


def test_columns_that_no_input_reaches_are_rounded_to_nearest():
    layer, x = layer_and_input(LINEAR)
    x[:, 5] = 0
    nearest = layer.weight_quantizer(layer.weight.detach())
    assert Gptq().improve(Task(), layer, data_of(layer, x))["dead_columns"] == 1
    assert torch.equal(layer.weight[:, 5], nearest[:, 5])


@pytest.mark.parametrize("kind", [LINEAR, CONV, GROUPED])
def test_affine_finds_a_known_factor_and_shift(kind):
    layer, x = layer_and_input(kind)
    codes = layer.weight_quantizer.codes(layer.weight.detach())
    exact = layer.product_with(layer.weight_quantizer(layer.weight.detach()), layer.input_quantizers["input"](x))
    exact = exact.detach()
    gamma, beta = torch.linspace(0.7, 1.4, exact.shape[1]), torch.linspace(-1, 1, exact.shape[1])
    shape = (-1, *[1] * (exact.dim() - 2))
    wanted = exact * gamma.view(shape) + beta.view(shape)
    weight = torch.rand(wanted.shape, generator=generator(6))
    task = Task()
    Affine(weighted=True).improve(task, layer, data_of(layer, x, weight, wanted))
    assert torch.equal(layer.weight_quantizer.codes(layer.weight.detach()), codes)
    assert bool(task.structure) == (kind == GROUPED)  # which has no bias
    layer.freeze()
    torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-5)


def test_affine_without_scales_of_its_own_fits_the_bias_alone():
    layer, x = layer_and_input(LINEAR, granularity=PerTensor())
    scale, exact = layer.weight_quantizer.scale.clone(), layer(x).detach()
    told = Affine().improve(Task(), layer, data_of(layer, x))
    assert told["gamma"] == [1.0, 1.0]
    assert torch.equal(layer.weight_quantizer.scale, scale)
    layer.freeze()
    torch.testing.assert_close((layer(x) - exact).mean(0), torch.zeros(10), rtol=0, atol=1e-5)


def test_affine_leaves_what_is_exact_as_it_is():
    layer, x = layer_and_input(LINEAR)
    layer.weight = nn.Parameter(layer.weight_quantizer(layer.weight.detach()))
    x = layer.input_quantizers["input"](x)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    Affine().improve(Task(), layer, data_of(layer, x))
    torch.testing.assert_close(layer.weight, weight, rtol=1e-6, atol=0)
    torch.testing.assert_close(layer.bias, bias, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("kind", [LINEAR, CONV, GROUPED])
def test_erq_moves_weight_and_bias_by_a_ridge_regression(kind, weighted):
    layer, x = layer_and_input(kind)
    old, exact = as_matrix(layer, layer.weight.detach()).double(), layer(x).detach()
    bias = np.zeros(len(layer.weight)) if layer.bias is None else layer.bias.detach().double().numpy()
    data = data_of(layer, x, torch.full(exact.shape, 0.5))  # as all errors cost the same, weights change nothing
    Erq(rounding="none", ridge=0.05, weighted=weighted).improve(Task(), layer, data)
    target = exact.movedim(1, -1).reshape(-1, len(bias)).double().numpy().reshape(-1, len(old), old.shape[1])
    for group, inputs in enumerate(rows(layer, x).double().numpy()):
        own = slice(group * old.shape[1], (group + 1) * old.shape[1])
        ones = np.hstack([inputs, np.ones((len(inputs), 1))])
        gram = ones.T @ ones
        gram += 0.05 * np.diag(gram).mean() * np.eye(len(gram))
        change = np.linalg.solve(gram, ones.T @ (target[:, group] - bias[own] - inputs @ old[group].numpy().T))
        moved = as_matrix(layer, layer.weight.detach())[group].numpy()
        assert moved == pytest.approx(old[group].numpy() + change[:-1].T, rel=1e-3, abs=1e-5)
        assert layer.bias.detach().numpy()[own] == pytest.approx(bias[own] + change[-1], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("kind", [LINEAR, CONV])
def test_erq_rounds_what_it_moved_by_columns_as_gptq_does(kind):
    moved, x = layer_and_input(kind)
    Erq(rounding="none").improve(Task(), moved, data_of(moved, x))
    layer, _ = layer_and_input(kind)
    Erq(rounding="columns", damp=0.02).improve(Task(), layer, data_of(layer, x))
    hessian = rows(layer, x)[0].double()
    hessian = (hessian.T @ hessian).numpy()
    order = np.argsort(-np.diag(hessian), kind="stable")
    hessian += 0.02 * np.diag(hessian).mean() * np.eye(len(hessian))
    grid = ElementGrid.of(layer)
    weight = as_matrix(layer, moved.weight.detach())[0].double().numpy()
    expected = naive_gptq(weight, hessian, grid.scale[0].numpy(), -4, 3, order)
    found = as_matrix(layer, layer.weight_quantizer.codes(layer.weight.detach()))[0].numpy()
    assert (found == expected).mean() > 0.99  # the moved weight went through float32, which may move a tie
    assert torch.equal(layer.bias, moved.bias)
    assert torch.equal(layer.weight_quantizer(layer.weight.detach()), layer.weight)


def test_erq_moves_nothing_where_the_input_is_exact():
    layer, x = layer_and_input(LINEAR)
    x, old = layer.input_quantizers["input"](x), layer.weight.detach().clone()
    assert Erq(rounding="none").improve(Task(), layer, data_of(layer, x))["moved"] < 1e-5
    torch.testing.assert_close(layer.weight, old, rtol=1e-5, atol=1e-6)


def test_a_row_with_two_weights_counts_twice():
    layer, x = layer_and_input(LINEAR)
    cost = torch.ones(len(x), 10)
    cost[::3] = 2
    twice = torch.cat([x, x[::3]])
    one = gram_of(layer, data_of(layer, x, cost), "hessian", deviation=True, residual=True, ones=True)
    other = gram_of(layer, data_of(layer, twice), "l2", deviation=True, residual=True, ones=True)
    factor = one.hessian[0, -1, -1] / other.hessian[0, -1, -1]  # weights are divided by a power of two
    for a, b in ((one.hessian, other.hessian), (one.deviation, other.deviation), (one.residual, other.residual)):
        torch.testing.assert_close(a, b * factor, rtol=1e-4, atol=1e-4)


# As parts of recipes

TEXTS = ["a red star", "two blue cups on sand", "a big green tree to the left of a small black house", "a fish"]
BASE = [{"equalize": {}}, {"grids": {"softmax": "twin", "gelu": "twin"}}, {"search": {}}]
BLOCK = ("clip.visual.transformer.resblocks.0.mlp.*", "*.0.attn.qk", "clip.token_embedding")


@pytest.fixture(scope="module")
def clip():
    return load_clip("mini-vit", "mini")


@pytest.fixture(scope="module")
def batch(clip):
    images = torch.rand(16, 3, 64, 64, generator=generator())
    return images, clip.preprocessing.tokenizer(TEXTS * 4)


def recipe_of(*stages, include=BLOCK, **options):
    bits = BitWidths.resolve({"weight_bits": 3, "activation_bits": 4})
    return compose([*BASE, *stages], bits=bits, include=include, **options)


ALL = ({"erq": {"rounding": "none"}}, "gptq", "affine", "bias_correction")


def test_what_has_no_weight_says_so_and_what_has_is_kept_or_undone(clip, batch):
    report = quantize(copy.deepcopy(clip.model), [batch], recipe_of(*ALL))
    for name in ("erq", "gptq", "affine"):
        told = report.stages[name]
        assert told["clip.visual.transformer.resblocks.0.attn.qk"]["reason"] == "a product of activations has no weight"
        assert told["clip.token_embedding"]["reason"] == "a table multiplies nothing"
        tried = [entry for entry in told.values() if "before" in entry]
        assert len(tried) == 2
        assert all((entry["after"] <= entry["before"]) == entry["kept"] for entry in tried)
    assert any(entry["kept"] for entry in report.stages["gptq"].values())


@pytest.mark.parametrize(
    ("grids", "options"),
    [
        ({"group_size": 32, "inputs": "per_token"}, {}),
        pytest.param({"gelu": "best"}, {"store_bfloat16": True, "token_share": 0.5}, marks=pytest.mark.slow),
        ({"per_channel": False}, {"propagate": "layer"}),
    ],
)
def test_other_grids_and_ways_to_collect_compose_with_it(grids, options, clip, batch):
    bits = BitWidths.resolve({"weight_bits": 3, "activation_bits": 8})
    recipe = compose([{"grids": grids}, "search", "gptq", "affine"], bits=bits, include=BLOCK[:1], **options)
    model = copy.deepcopy(clip.model)
    report = quantize(model, [batch], recipe)
    assert all(entry["kept"] == (entry["after"] <= entry["before"]) for entry in report.stages["gptq"].values())
    with torch.no_grad():
        found, wanted = model.encode_image(batch[0]), clip.model.encode_image(batch[0])
    assert torch.cosine_similarity(found, wanted).min() > 0.9


def test_forms_from_one_session_are_those_of_runs_of_their_own():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 8)), torch.randn(64, 16, generator=generator())
    base, bits = ["grids", "search"], BitWidths.resolve({"weight_bits": 3, "activation_bits": 4})
    recipes = [compose([*base, *more], bits=bits) for more in ([], ["gptq", "affine"], ["erq"], ["gptq", "affine"])]
    for recipe, form in zip(recipes, quantize_many({"net": net}, [x], recipes, forward=net), strict=True):
        alone = copy.deepcopy(net)
        report = quantize({"net": alone}, [x], recipe, forward=alone)
        with form.installed() as shared:
            assert shared.stages == report.stages
            state = net.state_dict()
            assert all(torch.equal(value, state[name]) for name, value in alone.state_dict().items())


@pytest.mark.parametrize("stages", [list(ALL), pytest.param(["erq", "bias_correction"], marks=pytest.mark.slow)])
def test_saved_loaded_and_undone_to_the_bit(stages, batch, tmp_path):
    clip, recipe = load_clip("mini-vit", "mini"), recipe_of(*stages)
    identity = identify(clip)
    (form,) = quantize_many(clip.model, [batch], [recipe])
    floats = {name: value.clone() for name, value in clip.model.state_dict().items()}
    with form.installed() as report:
        wanted = clip.model.encode_image(batch[0])
        save_quantized(tmp_path / "saved", clip.model, report=report, recipe=recipe, identity=identity)
    now = clip.model.state_dict()
    assert now.keys() == floats.keys()
    assert all(torch.equal(now[name], value) for name, value in floats.items())
    assert torch.equal(load_quantized(tmp_path / "saved").model.encode_image(batch[0]), wanted)


@pytest.mark.parametrize(
    ("stages", "told"),
    [
        (
            [{"gptq": {"layers": ["*.attn.qk"]}}],
            r"stage gptq cannot fit .*\.0\.attn\.qk: a product of act",
        ),
        ([{"affine": {"layers": ["clip.token_embedding"]}}], "cannot fit clip.token_embedding: a table multiplies"),
        (
            [{"erq": {"layers": ["clip.transformer.*"]}}],
            "cannot fit clip.transformer.*: not in quantize.incl",
        ),
        ([{"gptq": {"layers": ["nowhere"]}}], "'nowhere' matches none of"),
        ([{"gptq": {"damp": 0.0}}], "damp of stage gptq must be above 0"),
        ([{"erq": {"ridge": -1.0}}], "ridge of stage erq must be above 0"),
        ([{"erq": {"ridge": 1e-300}}], "ridge of stage erq must be above 0, at least 1e-09"),
        ([{"qwt": {"ridge": 1e-300}}], "ridge of stage qwt must be above 0, at least 1e-09"),
        ([{"gptaq": {"strength": float("nan")}}], "strength of stage gptaq must be at least 0 and at most 1, got nan"),
        ([{"gptaq": {"strength": -1.0}}], "strength of stage gptaq must be at least 0"),
        ([{"affine": {"largest": 0.5}}], "largest of stage affine must be at least 1"),
        (["gptq", "gptaq"], "stage gptaq must not stand behind gptq"),
        (["gptq", "erq"], "stage erq must not stand behind gptq"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name_before_any_data(stages, told, clip):
    with pytest.raises(ConfigError, match=told):
        preview(clip.model, recipe_of(*stages))


def test_what_it_holds_counts_for_the_memory_limit(clip, batch):
    recipes = recipe_of(), recipe_of("gptq")
    plain, more = (quantize(copy.deepcopy(clip.model), [batch], recipe, dry_run=True) for recipe in recipes)
    columns = 4 * 128 + 1  # of `c_proj`
    assert more.memory_bytes - plain.memory_bytes == 8 * 6 * (columns**2 + 128 * 512)


def test_it_can_be_kept_to_some_layers(clip, batch):
    report = quantize(copy.deepcopy(clip.model), [batch], recipe_of({"gptq": {"layers": ["*.mlp.*"]}}))
    assert {name.rpartition(".")[2] for name in report.stages["gptq"]} == {"c_fc", "c_proj"}


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["gptq", "erq", "affine", "bias_correction"])
def test_convolutions_and_blocks_in_order(stage):
    clip = load_clip("mini-resnet", "mini")
    batch = torch.rand(8, 3, 64, 64, generator=generator()), clip.preprocessing.tokenizer(TEXTS * 2)
    recipe = recipe_of(stage, include=("clip.visual.layer1.*", "clip.visual.conv*"), propagate="block")
    report = quantize(clip.model, [batch], recipe)
    told = [entry for entry in report.stages[stage].values() if "before" in entry]
    assert len(told) > 5
    assert any(entry["kept"] for entry in told)
    assert clip.model.encode_image(batch[0]).isfinite().all()


def calibrate(rank, world_size):
    """Fit weights on this rank's samples."""
    clip = load_clip("mini-vit", "mini")
    images = torch.rand(8, 3, 64, 64, generator=generator())[rank::world_size]
    texts = clip.preprocessing.tokenizer(TEXTS * 2)[rank::world_size]
    batches = list(zip(images.split(1), texts.split(1), strict=True))
    report = quantize(clip.model, batches, recipe_of(*ALL, include=BLOCK[:1]))
    return clip.model.state_dict(), {name: report.stages[name] for name in ("erq", "gptq", "affine", "bias_correction")}


@pytest.mark.slow
def test_two_processes_fit_what_one_does():
    (first, told), (second, _) = run_processes(calibrate, 2, world_size=2, timeout=400)
    ((alone, expected),) = run_processes(calibrate, 1, world_size=1, timeout=400)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first.keys() == alone.keys()
    for stage, layers in expected.items():
        for name, entry in layers.items():
            assert told[stage][name]["kept"] == entry["kept"]
            if "before" in entry:
                for key in ("before", "after"):
                    assert told[stage][name][key] == pytest.approx(entry[key], rel=1e-3)
    codes = [name for name in first if name.endswith("weight_codes")]
    assert codes
    assert all((first[name] != alone[name]).float().mean() < 0.01 for name in codes)


def calibrate_one_sided(rank, world_size):
    """Only the first process has pictures."""
    clip = load_clip("mini-vit", "mini")
    images = torch.rand(8, 3, 64, 64, generator=generator()) if rank == 0 else None
    stages = [*ALL, "qwt"]
    quantize(clip.model, [(images, clip.preprocessing.tokenizer(TEXTS * 2))], recipe_of(*stages, include=BLOCK[:1]))
    return clip.model.state_dict()


@pytest.mark.slow
def test_a_process_that_reaches_no_such_layer_takes_part():
    first, second = run_processes(calibrate_one_sided, 2, world_size=2, timeout=400)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
