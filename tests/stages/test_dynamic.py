"""Ranges at run time: what is in a batch besides never matters, and each grid is that of its token or sample."""

import copy

import pytest
import torch

from lit_clipq import load_quantized, quantize, save_quantized
from lit_clipq.api import preview
from lit_clipq.checkpoint import identify
from lit_clipq.errors import ConfigError
from lit_clipq.functional.granularity import PerChannel, PerGroup, PerSample, PerTensor, PerToken, extrema
from lit_clipq.functional.uniform import affine_parameters, fake_quantize
from lit_clipq.models import encode_text, load_clip
from lit_clipq.nn.quantizer import UniformQuantizer
from lit_clipq.recipes import BitWidths, compose, make_recipe

TEXTS = ["a red star", "two blue cups on sand", "a big green tree to the left of a small black house", "a fish"]
BITS = BitWidths.resolve({"bits": 4})
BLOCK = "resblocks.0"


@pytest.fixture(scope="module")
def clip():
    return load_clip("mini-vit", "mini")


@pytest.fixture(scope="module")
def batch(clip):
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return images, clip.preprocessing.tokenizer(TEXTS)


def run(clip, batch, recipe):
    model = copy.deepcopy(clip.model)
    return model, quantize(model, [batch], recipe)


def dynamic(inputs, **options):
    return compose([{"grids": {"inputs": inputs}}, "ranges"], bits=BITS, **options)


@pytest.mark.parametrize(
    ("granularity", "axes"), [(PerToken(), (-1,)), (PerToken(-2), (-2,)), (PerSample(), (1, 2, 3))]
)
@pytest.mark.parametrize("gradients", [False, True])
def test_grids_are_those_of_each_piece(granularity, axes, gradients):
    x = torch.randn(3, 2, 5, 7, generator=torch.Generator().manual_seed(0))
    x = x * torch.linspace(0.5, 9, x.numel()).view(x.shape)
    quantizer = UniformQuantizer(4, symmetric=False, granularity=granularity)
    low, high = (f(x, dim=axes, keepdim=True) for f in (torch.amin, torch.amax))
    assert all(torch.equal(a, b) for a, b in zip(extrema(x, granularity), (low, high), strict=True))
    rounded = quantizer(x.clone().requires_grad_(gradients))
    assert torch.equal(rounded.detach(), quantizer(x))
    scale, zero = affine_parameters(low, high, 4, symmetric=False)
    expected = ((x / scale).round() + zero).clamp(0, 15).sub(zero) * scale
    assert ((rounded - expected).abs() > 1e-5).float().mean() < 0.01  # ties that a reciprocal decides otherwise
    for number in range(3):
        assert torch.equal(quantizer(x[number : number + 1]), quantizer(x)[number : number + 1])
    assert quantizer.calibrated
    assert not quantizer.state_dict()


def test_fused_and_plain_rounding_agree_for_tokens_that_are_columns_and_for_samples():
    x = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    for granularity in (PerToken(-2), PerSample()):
        grid = affine_parameters(*extrema(x, granularity), 6, symmetric=False)
        plain = fake_quantize(x, *grid, 0, 63, granularity)
        assert torch.equal(fake_quantize(x.clone().requires_grad_(), *grid, 0, 63, granularity).detach(), plain)


@pytest.mark.parametrize("name", ["mini-vit", "mini-resnet"])
@pytest.mark.parametrize("inputs", ["per_token", "per_sample"])
def test_an_embedding_does_not_depend_on_its_batch(name, inputs):
    clip = load_clip(name, "mini")
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    images[1] *= 30  # a picture that would stretch a range of the whole batch
    texts = clip.preprocessing.tokenizer(TEXTS)
    quantize(clip.model, [(images, texts)], dynamic(inputs))
    with torch.no_grad():
        for encode, samples in ((clip.model.encode_image, images), (lambda t: encode_text(clip.model, t), texts)):
            whole = encode(samples)
            for number in range(4):
                one = encode(samples[number : number + 1])
                # products of other shapes round differently, and a tie may then take another code
                assert torch.nn.functional.cosine_similarity(one, whole[number : number + 1]) > 0.9995


def test_each_operand_has_the_grid_that_a_product_of_integers_allows(clip, batch):
    model, _ = run(clip, batch, dynamic("per_token"))
    block = model.visual.transformer.resblocks[0]
    kinds = {
        "qkv": block.attn.qkv_proj.input_quantizers["input"].granularity,
        "q": block.attn.qk.input_quantizers["a"].granularity,
        "k": block.attn.qk.input_quantizers["b"].granularity,
        "weights": block.attn.av.input_quantizers["a"].granularity,
        "values": block.attn.av.input_quantizers["b"].granularity,
        "patches": model.visual.conv1.input_quantizers["input"].granularity,
    }
    assert kinds == {
        "qkv": PerToken(),
        "q": PerToken(),
        "k": PerToken(-2),
        "weights": PerToken(),
        "values": PerChannel(-1),
        "patches": PerSample(),
    }
    assert block.attn.qkv_proj.weight_quantizer.granularity == PerChannel(0)
    model, _ = run(clip, batch, dynamic("per_sample"))
    assert model.visual.transformer.resblocks[0].attn.qkv_proj.input_quantizers["input"].granularity == PerSample()
    assert model.transformer.resblocks[0].attn.qkv_proj.input_quantizers["input"].granularity == PerToken()
    static, _ = run(clip, batch, make_recipe("vanilla", bits=BITS))
    assert static.visual.conv1.input_quantizers["input"].granularity == PerTensor()


def test_what_stands_behind_the_end_of_a_text_changes_nothing(clip, batch):
    model, _ = run(clip, batch, dynamic("per_token"))
    texts = batch[1].clone()
    with torch.no_grad():
        expected = encode_text(model, texts)
        ends = texts.argmax(-1)
        for row, end in zip(texts, ends, strict=True):
            row[end + 1 :] = 7
        # the start token is a constant of the products, and no range sees it or what follows the end
        torch.testing.assert_close(encode_text(model, texts), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["dynamic", "zeroquant"])
def test_they_are_saved_and_loaded(name, batch, tmp_path):
    clip = load_clip("mini-vit", "mini")
    identity, recipe = identify(clip), make_recipe(name, bits=BITS)
    report = quantize(clip.model, [batch], recipe)
    save_quantized(tmp_path / "saved", clip.model, report=report, recipe=recipe, identity=identity)
    loaded = load_quantized(tmp_path / "saved").model
    assert torch.equal(loaded.encode_image(batch[0]), clip.model.encode_image(batch[0]))
    assert torch.equal(loaded.encode_text(batch[1]), clip.model.encode_text(batch[1]))


def test_a_search_of_weights_goes_with_tokens_and_is_never_worse(clip, batch):
    include = (f"clip.visual.transformer.{BLOCK}.*",)
    grids = {"inputs": "per_token", "group_size": 32}
    recipe = compose([{"grids": grids}, "search"], bits=BITS, include=include, start_token=False)
    model, report = run(clip, batch, recipe)
    assert all(result.after <= result.before for result in report.layers.values())
    assert sum(r.after for r in report.layers.values()) < 0.9 * sum(r.before for r in report.layers.values())
    weight = model.visual.transformer.resblocks[0].mlp.c_fc.weight_quantizer
    assert weight.granularity == PerGroup(32)
    assert model.visual.transformer.resblocks[0].attn.av.input_quantizers["b"].scale.numel() > 1
    assert model.encode_image(batch[0]).isfinite().all()


def test_groups_that_do_not_divide_are_refused_by_layer_name_before_any_data(clip):
    with pytest.raises(ConfigError, match=r"group_size 48 does not divide the 128 inputs of clip\.visual\.transformer"):
        preview(clip.model, compose([{"grids": {"group_size": 48}}, "ranges"]))
    excluded = compose([{"grids": {"group_size": 48}}, "ranges"], include=("clip.visual.conv1",))
    assert preview(clip.model, excluded).quantized
    with pytest.raises(ConfigError, match="leave out per_channel: false"):
        compose([{"grids": {"group_size": 64, "per_channel": False}}, "ranges"])
    with pytest.raises(ConfigError, match="group_size of stage grids must be at least 1, got 0"):
        compose([{"grids": {"group_size": 0}}, "ranges"])


def test_a_range_of_a_sample_is_not_for_stages_that_compare_rows():
    with pytest.raises(ConfigError, match="one range for all rows of a sample, which stage search cannot see"):
        compose([{"grids": {"inputs": "per_sample"}}, "search"])
