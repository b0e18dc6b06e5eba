"""Smoothing against its formula, over towers of every kind, and what it brings on planted outliers."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from lit_clipq import load_quantized, quantize, save_quantized
from lit_clipq.api import quantize_many
from lit_clipq.calibration.channels import Channels
from lit_clipq.checkpoint import identify
from lit_clipq.errors import ConfigError
from lit_clipq.models import load_clip
from lit_clipq.recipes import BitWidths, compose, make_recipe
from lit_clipq.stages.products import ReaderError
from lit_clipq.stages.smooth import smoothing_factors
from tests.models.conftest import CONFIGS
from tests.stages.float_forms import embed, largest_change, prepared, same_state, tower

TEXTS = ["a red star", "two blue cups on sand", "a big green tree to the left of a small black house", "a fish"]


def told(report):
    """Return what smoothing says of its links."""
    return {name: found for name, found in report.stages["smooth"].items() if name != "float outputs"}


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_factors_are_those_of_the_formula(alpha):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 12, generator=generator) * torch.logspace(-1, 2, 12)
    linear, convolution = torch.randn(5, 12, generator=generator), torch.randn(7, 12, 3, 3, generator=generator)
    expected = []
    for j in range(12):
        largest = max(np.abs(linear.numpy()[:, j]).max(), np.abs(convolution.numpy()[:, j]).max())
        expected.append(float(np.abs(x.numpy()[:, j]).max()) ** alpha / float(largest) ** (1 - alpha))
    found = smoothing_factors([(linear, Channels.of(x)), (convolution, Channels.of(x / 2))], alpha)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)


def test_channels_that_are_zero_stay():
    x, weight = torch.ones(2, 3), torch.full((1, 3), 0.5)
    x[:, 0] = 0
    weight[:, 1] = 0
    assert smoothing_factors([(weight, Channels.of(x))], 0.5).tolist() == pytest.approx([1, 1, 2**0.5])


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_float_function_stays_and_comes_back_to_the_bit(kind):
    model, batch, other = tower(kind)
    exclude = ("clip.text_decoder.*",) if kind == "coca" else ()
    form, state = prepared(model, [batch], [{"smooth": {"alpha": 0.5}}], exclude=exclude)
    before = embed(model, other)
    with form._draft.scaled_in_place():
        assert not same_state(model, state)
        after = embed(model, other)
    assert largest_change(before, after) < 1e-5
    assert form.report.stages["smooth"]["float outputs"]["relative change"] < 1e-5
    assert any(found["alpha"] is not None for found in told(form.report).values())
    with form.installed():
        assert largest_change(before, embed(model, other)) > 1e-5
    assert same_state(model, state)


def test_links_are_those_of_the_tower():
    vit, resnet = (tower(kind) for kind in ("vit", "resnet"))
    form, _ = prepared(vit[0], [vit[1]], ["smooth"])
    block = "clip.visual.transformer.resblocks.0"
    links = {f"{block}.ln_1", f"{block}.ln_2", f"{block}.attn.qkv_proj", "clip.visual.proj", "clip.text_projection"}
    assert links <= set(told(form.report))
    assert "clip.visual.ln_pre" not in told(form.report)
    form, _ = prepared(resnet[0], [resnet[1]], [{"smooth": {"convolutions": 1.0}}])
    # the stem's three, and the two within a bottleneck: what follows the addition is read by the next addition, too
    stem = {f"clip.visual.conv{i}" for i in (1, 2, 3)}
    inner = {"clip.visual.layer1.0.conv1", "clip.visual.layer1.0.conv2"}
    assert stem | inner <= set(told(form.report))
    assert "clip.visual.layer1.0.conv3" not in told(form.report)


def test_only_links_that_are_better_on_rows_held_out_are_smoothed():
    model, batch, _ = tower("vit")
    found = told(prepared(model, [batch], ["smooth"], bits=4)[0].report)
    assert all(f["after"] < f["before"] for f in found.values() if f["alpha"] is not None)
    worse = told(prepared(model, [batch], [{"smooth": {"alpha": 0.0}}], bits=4)[0].report)
    assert "no share is better on rows held out" in {f.get("reason") for f in worse.values()}
    floats = told(prepared(model, [batch], ["smooth"], include=("clip.visual.*",))[0].report)
    assert floats["clip.transformer.resblocks.0.ln_1"] == {"alpha": None, "reason": "its readers are not quantized"}
    alone = told(prepared(model, [batch], [{"smooth": {"divide_inputs": False}}])[0].report)
    assert alone["clip.visual.proj"]["reason"] == "others read the LayerNorm, and divide_inputs is false"


def test_what_is_held_out_are_whole_samples():
    model, batch, _ = tower("vit")
    draft = prepared(model, [batch], ["smooth"])[0].draft
    entry = next(e for e in draft.plan.quantized if e.name == "clip.visual.transformer.resblocks.0.mlp.c_fc")
    samples = draft.links.samples[entry.name].keys // 2**24
    held, fitted = (ReaderError(draft, entry, draft.links, held_out=held) for held in (True, False))
    assert 0 < len(held.x) == int((samples % 4 == 1).sum())
    assert 0 < len(fitted.x) == int((samples % 4 != 1).sum())


class Reading(nn.Module):
    """A block whose second layer reads the LayerNorm that the residual stream also takes, as in post-norm networks."""

    def __init__(self, width):
        super().__init__()
        self.before, self.inner = nn.LayerNorm(width), nn.Linear(width, width)
        self.after, self.outer = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x):
        x = self.after(x + self.inner(self.before(x)))
        return x + self.outer(x)


def test_channels_that_something_else_reads_stay_and_the_report_says_so():
    torch.manual_seed(0)
    network = nn.Sequential(Reading(16), Reading(16)).eval()
    for block in network:
        for norm in (block.before, block.after):
            norm.weight.data[3] = 50
    recipe = compose([{"smooth": {}}, "grids", "ranges"])
    (form,) = quantize_many({"net": network}, [torch.randn(64, 16)], [recipe], forward=network)
    found = told(form.report)
    assert {name for name, f in found.items() if f["alpha"] is not None} == {"net.0.before", "net.1.before"}
    assert found["net.0.after"] == {"alpha": None, "reason": "something else reads these channels"}


@pytest.mark.parametrize(
    ("options", "said"),
    [({"alpha": 1.5}, "alpha of smooth"), ({"steps": 0}, "steps of smooth"), ({"convolutions": -1}, "convolutions of")],
)
def test_options_out_of_range_are_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        compose([{"smooth": options}, "grids", "search"])


@pytest.fixture(scope="module")
def outlier():
    clip = load_clip("mini-vit-outlier", "mini")
    images = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return clip, (images, clip.preprocessing.tokenizer(TEXTS * 2))


def test_planted_outliers_cost_eight_bits_little_once_smoothed(outlier):
    clip, batch = outlier
    before = embed(clip.model, batch)
    bits = BitWidths.resolve({"bits": 8})
    plain, smoothed = copy.deepcopy(clip.model), copy.deepcopy(clip.model)
    quantize(plain, [batch], make_recipe("vanilla", bits=bits))
    quantize(smoothed, [batch], compose(["smooth", "grids", "ranges"], bits=bits, attention_products=False))
    errors = [
        sum(float((x - y).norm() / x.norm()) for x, y in zip(before, embed(model, batch), strict=True))
        for model in (plain, smoothed)
    ]
    assert errors[1] < 0.2 * errors[0]


def test_a_smoothed_model_is_saved_and_loaded(outlier, tmp_path):
    clip, batch = outlier
    model = copy.deepcopy(clip.model)
    recipe = compose([{"smooth": {"alpha": 0.5}}, "grids", "ranges"], bits=BitWidths.resolve({"bits": 8}))
    report = quantize(model, [batch], recipe)
    assert model.visual.proj.input_divisor is not None
    save_quantized(tmp_path / "saved", model, report=report, recipe=recipe, identity=identify(clip))
    loaded = load_quantized(tmp_path / "saved")
    assert all(torch.equal(x, y) for x, y in zip(embed(model, batch), embed(loaded.model, batch), strict=True))


@pytest.mark.parametrize("propagate", ["none", pytest.param("block", marks=pytest.mark.slow)])
def test_several_widths_share_a_collection_and_equal_runs_of_their_own(outlier, propagate):
    clip, batch = outlier
    few = ("clip.visual.transformer.resblocks.0.*", "clip.visual.proj")
    recipes = [
        compose(
            ["smooth", "grids", {"search": {"distance": "l2"}}],
            bits=BitWidths.resolve({"bits": bits}),
            include=few,
            propagate=propagate,
        )
        for bits in (8, 4)
    ]
    model = copy.deepcopy(clip.model)
    for recipe, form in zip(recipes, quantize_many(model, [batch], recipes), strict=True):
        alone = copy.deepcopy(clip.model)
        quantize(alone, [batch], recipe)
        with form.installed():
            assert same_state(model, alone.state_dict())
