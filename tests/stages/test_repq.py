"""RepQ's folding against the quantizer for each channel that it stands for, over towers of every kind."""

import copy

import pytest
import torch
import torch.nn.functional as F

from lit_clipq import load_quantized, quantize, save_quantized
from lit_clipq.api import quantize_many
from lit_clipq.calibration.channels import Channels
from lit_clipq.checkpoint import identify
from lit_clipq.models import load_clip
from lit_clipq.recipes import BitWidths, compose
from lit_clipq.stages.repq import reparameterized
from tests.models.conftest import CONFIGS
from tests.stages.float_forms import embed, largest_change, prepared, same_state, tower


def rows(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(300, 12, generator=generator, dtype=torch.float64) * torch.logspace(-1, 1, 12) + 3 * torch.randn(
        12, generator=generator
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_one_grid_rounds_the_folded_channels_as_a_grid_each_rounds_them(bits):
    x, levels = rows(), 2**bits - 1
    found = reparameterized([Channels.of(x)], bits)
    folded = x / found.ratio - found.shift
    low, high = x.amin(0), x.amax(0)
    scale = (high - low) / levels
    step = scale.mean()
    zero = (-low / scale).mean().round()
    # every channel spans the one grid: its ends are the codes 0 and 2^b - 1
    torch.testing.assert_close(folded.amin(0) / step + zero, torch.zeros(12, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(folded.amax(0) / step + zero, torch.full((12,), levels).double(), rtol=0, atol=1e-9)
    one = (((folded / step).round() + zero).clamp(0, levels) - zero) * step
    each = (((x - low) / scale + zero - zero.round()).round().clamp(0, levels)) * scale + low
    torch.testing.assert_close((one + found.shift) * found.ratio, each, rtol=0, atol=1e-9)


def test_folding_is_the_same_function_and_channels_without_a_range_become_zero():
    x = rows()
    x[:, 4] = 7.5
    generator = torch.Generator().manual_seed(3)
    weight, bias = torch.randn(5, 12, generator=generator).double(), torch.randn(5, generator=generator).double()
    found = reparameterized([Channels.of(x)], 4)
    wide = weight * found.ratio
    folded = F.linear(x / found.ratio - found.shift, wide, bias + wide @ found.shift)
    torch.testing.assert_close(folded, F.linear(x, weight, bias))
    assert float((x[:, 4] / found.ratio[4] - found.shift[4]).abs().max()) == 0
    nothing = reparameterized([Channels.of(torch.ones(3, 2))], 4)
    assert torch.equal(nothing.ratio, torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("before", [[], ["smooth"]], ids=["alone", "behind smooth"])
def test_the_float_function_stays_and_comes_back_to_the_bit(kind, before):
    model, batch, other = tower(kind)
    exclude = ("clip.text_decoder.*",) if kind == "coca" else ()
    form, state = prepared(model, [batch], [*before, "repq"], exclude=exclude)
    expected = embed(model, other)
    draft = form._draft
    for do, _ in draft.changes:
        do()
    with draft.scaled_in_place():
        after = embed(model, other)
    draft.undo_changes()
    assert same_state(model, state)
    assert largest_change(expected, after) < 1e-5
    told = dict(form.report.stages["repq"])
    assert told.pop("float outputs")["relative change"] < 1e-5
    assert all(found["after"] < found["before"] for found in told.values() if "reason" not in found)
    if not before:
        assert draft.changes
        assert any("reason" not in found for found in told.values())
    with form.installed():
        pass
    assert same_state(model, state)


def test_what_is_left_alone_is_told():
    model, batch, _ = tower("vit")
    floats = prepared(model, [batch], ["repq"], include=("clip.visual.*",))[0].report.stages["repq"]
    assert floats["clip.transformer.resblocks.0.ln_1"]["reason"] == "what its readers read is not quantized"
    assert "clip.visual.ln_post" not in floats
    # weights of 2 bits suffer more from a multiplied column than inputs of 8 bits gain
    widths = BitWidths.resolve({"weight_bits": 2, "activation_bits": 8})
    (form,) = quantize_many(model, [batch], [compose(["repq", "grids", "ranges"], bits=widths)])
    assert "its error is not smaller" in {found.get("reason") for found in form.report.stages["repq"].values()}


def test_a_model_whose_layers_got_a_bias_is_saved_and_loaded(tmp_path):
    clip = load_clip("mini-vit-outlier", "mini")
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    batch = images, clip.preprocessing.tokenizer(["a red star", "two cups", "a fish", "three green keys"])
    identity, model = identify(clip), copy.deepcopy(clip.model)
    recipe = compose(["repq", "grids", "ranges"], bits=BitWidths.resolve({"bits": 4}))
    report = quantize(model, [batch], recipe)
    save_quantized(tmp_path / "saved", model, report=report, recipe=recipe, identity=identity)
    loaded = load_quantized(tmp_path / "saved")
    assert all(torch.equal(x, y) for x, y in zip(embed(model, batch), embed(loaded.model, batch), strict=True))
