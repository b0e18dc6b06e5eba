"""Which operand gets which grid, from the recipe to a saved model."""

import copy

import pytest
import torch

from lit_clipq import load_quantized, quantize, save_quantized
from lit_clipq.checkpoint import identify
from lit_clipq.errors import ConfigError
from lit_clipq.models import load_clip
from lit_clipq.nn.adaptive_log import AdaptiveLogQuantizer
from lit_clipq.nn.quantizer import TwinGeluQuantizer, TwinSoftmaxQuantizer
from lit_clipq.recipes import BitWidths, compose, make_recipe

FOUR = BitWidths.resolve({"bits": 4})
FEW = ("clip.visual.transformer.resblocks.0.mlp.c_proj", "clip.visual.transformer.resblocks.0.attn.av")


@pytest.fixture(scope="module")
def clip():
    return load_clip("mini-vit", "mini")


@pytest.fixture(scope="module")
def batch():
    return torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)), None


def operands(model):
    block = model.visual.transformer.resblocks[0]
    return block.mlp.c_proj.input_quantizers["input"], block.attn.av.input_quantizers["a"]


def run(clip, batch, **grids):
    model = copy.deepcopy(clip.model)
    recipe = compose([{"grids": grids}, "search"], bits=FOUR, include=FEW, start_token=False)
    return model, quantize(model, [batch], recipe)


def test_adaptive_grids_stand_behind_the_activation_with_its_exact_minimum(clip, batch):
    model, _ = run(clip, batch, softmax="adalog", gelu="adalog")
    gelu, softmax = operands(model)
    assert type(gelu) is type(softmax) is AdaptiveLogQuantizer
    assert gelu.minimum == pytest.approx(-0.16361, abs=1e-5)  # that of QuickGELU; GELU has -0.16997
    assert softmax.minimum == 0
    assert 1 <= int(gelu.base) <= 137


def test_behind_gelu_an_adaptive_grid_beats_the_twin_one_at_four_bits(clip, batch):
    results = [run(clip, batch, softmax="twin", gelu=gelu)[1].layers[FEW[0]].after for gelu in ("twin", "adalog")]
    assert results[1] < 0.9 * results[0]


def test_the_best_of_both_is_no_worse_than_the_twin_grid_and_is_told(clip, batch):
    twin = run(clip, batch, softmax="twin", gelu="twin")[1]
    model, best = run(clip, batch, softmax="best", gelu="best")
    for name, quantizer, kind in zip(FEW, operands(model), (TwinGeluQuantizer, TwinSoftmaxQuantizer), strict=True):
        assert best.layers[name].after <= twin.layers[name].after
        assert isinstance(
            quantizer, AdaptiveLogQuantizer if best.layers[name].after < twin.layers[name].after else kind
        )


def test_it_is_saved_and_loaded(batch, tmp_path):
    clip = load_clip("mini-vit", "mini")
    identity, recipe = identify(clip), make_recipe("adalog", bits=FOUR, include=FEW, start_token=False)
    report = quantize(clip.model, [batch], recipe)
    save_quantized(tmp_path / "saved", clip.model, report=report, recipe=recipe, identity=identity)
    loaded = load_quantized(tmp_path / "saved").model
    assert torch.equal(loaded.encode_image(batch[0]), clip.model.encode_image(batch[0]))
    assert isinstance(operands(loaded)[0], AdaptiveLogQuantizer)


@pytest.mark.parametrize("grid", ["adalog", "best", "twin"])
def test_minimum_and_maximum_do_not_decide_it(grid):
    with pytest.raises(ConfigError, match=f"cannot calibrate softmax: {grid} of stage grids; put search in its place"):
        compose([{"grids": {"softmax": grid}}, "ranges"])
