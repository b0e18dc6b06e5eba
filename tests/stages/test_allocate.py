"""Mixed precision: what is chosen, what it stands on, and what a saved model says of it."""

import copy
import itertools

import pytest
import torch

from lit_clipq import load_quantized, quantize, quantize_many, save_quantized
from lit_clipq.api import preview
from lit_clipq.checkpoint import identify, read_artefact
from lit_clipq.errors import ConfigError
from lit_clipq.models import load_clip, make_explicit
from lit_clipq.recipes import BitWidths, compose, make_recipe

BLOCK = "clip.visual.transformer.resblocks.0"
FEW = (f"{BLOCK}.mlp.*", f"{BLOCK}.attn.qk", f"{BLOCK}.attn.out_proj", "clip.visual.proj")
STAGES = [{"grids": {"softmax": "twin", "gelu": "twin"}}, {"search": {}}]
WIDTHS = ["w3", "w5", "w8"]
OPTIONS = {"include": FEW, "start_token": False}


def bits(patterns=None, **flags):
    return BitWidths.resolve({"weight_bits": 4, "activation_bits": 8, **flags}, patterns)


def compared(widths=WIDTHS, **options):
    return compose([*STAGES, {"allocate": {"widths": widths, **options}}], bits=bits(), **OPTIONS)


@pytest.fixture(scope="module")
def clip():
    return load_clip("mini-vit", "mini")


@pytest.fixture(scope="module")
def batch():
    return torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)), None


@pytest.fixture(scope="module")
def mixed(clip, batch):
    model = copy.deepcopy(clip.model)
    return model, quantize(model, [batch], compared())


def weights_of(clip):
    names = ("attn.out_proj", "mlp.c_fc", "mlp.c_proj")
    block = preview(clip.model, compared()).quantized
    sizes = {"out_proj": 1, "c_fc": 4, "c_proj": 4}  # times width^2
    width = clip.model.visual.transformer.width
    found = {f"{BLOCK}.{name}": sizes[name.rpartition(".")[2]] * width * width for name in names}
    found["clip.visual.proj"] = clip.model.visual.proj.numel()
    assert found.keys() == {entry.name for entry in block if entry.weight_bits is not None}
    return found


def test_the_choice_is_that_of_brute_force_over_the_reported_costs(clip, mixed):
    told = mixed[1].stages["allocate"]
    sizes = weights_of(clip)
    assert told["budget"] == 4 * sum(sizes.values())
    best = min(
        sum(told["costs"][name][f"w{w}a8"] for name, w in zip(sizes, choice, strict=True))
        for choice in itertools.product((3, 4, 5, 8), repeat=len(sizes))
        if sum(size * w for size, w in zip(sizes.values(), choice, strict=True)) <= told["budget"]
    )
    products = sum(cost["a8"] for name, cost in told["costs"].items() if name not in sizes)
    assert told["cost"] == pytest.approx(best + products, rel=1e-9)
    assert told["cost"] == told["no choice costs less than"]
    assert told["cost"] < told["cost of the recipe's widths"]


def test_costs_are_the_objectives_of_recipes_of_one_width_on_the_same_observations(clip, batch, mixed):
    told = mixed[1].stages["allocate"]["costs"]
    recipes = [compose(STAGES, bits=bits(weight_bits=w), **OPTIONS) for w in (3, 4, 5, 8)]
    for w, form in zip((3, 4, 5, 8), quantize_many(copy.deepcopy(clip.model), [batch], recipes), strict=True):
        for name, result in form.report.layers.items():
            key = "a8" if name.endswith((".qk", ".av")) else f"w{w}a8"
            assert told[name][key] == pytest.approx(result.after, rel=1e-5)


def test_map_results_and_size_are_those_of_the_widths_taken(mixed):
    _, report = mixed
    told = report.stages["allocate"]
    widths = {e.name: f"w{e.weight_bits}a{e.activation_bits}" for e in report.map.quantized if e.weight_bits}
    assert widths == {name: width for name, width in told["widths"].items() if width != "a8"}
    assert len(set(widths.values())) > 1
    assert sum(result.after for result in report.layers.values()) == pytest.approx(told["cost"], rel=1e-5)
    assert "grids" in report.stages


def test_the_widths_it_reports_given_as_patterns_are_the_same_network(clip, batch, mixed):
    model = copy.deepcopy(clip.model)
    given = mixed[1].stages["allocate"]["widths"]
    quantize(model, [batch], compose(STAGES, bits=bits(given), **OPTIONS))
    one, other = model.state_dict(), mixed[0].state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_it_is_saved_and_loaded_with_its_widths(batch, tmp_path):
    clip = load_clip("mini-vit", "mini")
    identity, recipe = identify(clip), compared(["w3", "w8"])
    report = quantize(clip.model, [batch], recipe)
    save_quantized(tmp_path / "saved", clip.model, report=report, recipe=recipe, identity=identity)
    loaded = load_quantized(tmp_path / "saved")
    assert torch.equal(loaded.model.encode_image(batch[0]), clip.model.encode_image(batch[0]))
    content = read_artefact(tmp_path / "saved").content
    assert [(e["name"], e["weight_bits"]) for e in content["map"]] == [
        (e.name, e.weight_bits) for e in report.map.entries
    ]


@pytest.mark.slow
def test_equalised_channels_are_scaled_once_for_all_widths_and_the_float_network_comes_back(clip, batch):
    model = copy.deepcopy(clip.model)
    make_explicit(model)
    floats = {name: value.clone() for name, value in model.state_dict().items()}
    recipe = make_recipe("mixed_bops", bits=bits(bits=6, weight_bits=None, activation_bits=None), include=FEW)
    (form,) = quantize_many(model, [batch], [recipe])
    told = form.report.stages["allocate"]
    macs = {e.name: e.macs for e in form.report.map.quantized}
    taken = sum(
        macs[e.name] * (e.weight_bits or e.activation_bits) * e.activation_bits for e in form.report.map.quantized
    )
    assert told["taken"] == taken <= told["budget"] == 36 * sum(macs.values())
    assert "reason" not in form.report.stages["equalize"]
    with form.installed():
        assert model.encode_image(batch[0]).isfinite().all()
    assert all(torch.equal(value, floats[name]) for name, value in model.state_dict().items())


def test_two_forms_of_the_same_recipe_each_take_their_layers(clip, batch):
    recipe = compared(["w8"], bits=6.0)
    one, other = quantize_many(copy.deepcopy(clip.model), [batch], [recipe, recipe])
    assert one.report.stages["allocate"] == other.report.stages["allocate"]
    assert {"w4a8", "w8a8"} <= set(one.report.stages["allocate"]["widths"].values())


def test_a_budget_below_the_smallest_widths_is_refused_before_any_data(clip):
    with pytest.raises(ConfigError, match=r"is 1\.5 bits, but the smallest of its widths take 3 on average"):
        preview(clip.model, compared(bits=1.5))
    with pytest.raises(ConfigError, match=r"is 3 bits, but the smallest of its widths take 5\.\d+ on average"):
        quantize(copy.deepcopy(clip.model), [(torch.rand(1, 3, 64, 64), None)], compared(budget="bops", bits=3.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": []}, "must name some to choose from"),
        ({"widths": ["w17"]}, "must be 2 to 16, or 32 for float; got 17"),
        ({"widths": ["float"]}, "must be 2 to 16 bits, got 'float'"),
        ({"widths": ["four"]}, "must be a number, `float`, or such as `w4a8`"),
        ({"bits": 0.0}, "must be above 0 and at most 32, got 0"),
        ({"bits": 1e200, "budget": "bops"}, "must be above 0 and at most 32, got 1e\\+200"),
        ({"budget": "speed"}, "budget must be one of size, bops"),
    ],
)
def test_nonsense_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        compared(**{"widths": WIDTHS, **options})


def test_it_stands_behind_a_stage_that_gives_scales_and_not_behind_quantized_layers():
    with pytest.raises(ConfigError, match="stage allocate needs scales"):
        compose(["grids", "allocate"])
    with pytest.raises(ConfigError, match="fits layers at several widths on one collection"):
        make_recipe("mixed_size", propagate="block")


def test_minima_and_maxima_can_be_allocated_as_well(clip, batch):
    recipe = compose(["grids", "ranges", {"allocate": {"widths": WIDTHS}}], bits=bits(), **OPTIONS)
    report = quantize(copy.deepcopy(clip.model), [batch], recipe)
    told = report.stages["allocate"]
    assert told["cost"] <= told["cost of the recipe's widths"]
    assert not report.layers
