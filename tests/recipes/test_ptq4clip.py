"""PTQ4CLIP as a whole, on the mini models."""

import copy

import pytest
import torch

from lit_clipq.api import quantize
from lit_clipq.calibration.objective import contrastive_cotangents, drawn_by
from lit_clipq.errors import CalibrationError, ConfigError
from lit_clipq.models import encode_image, encode_text, load_clip, make_explicit
from lit_clipq.nn.quantizer import LogQuantizer, TwinGeluQuantizer, TwinSoftmaxQuantizer, UniformQuantizer
from lit_clipq.nn.start_token import StartTokenAverage, StartTokenScores
from lit_clipq.recipes import BitWidths, make_recipe

TEXTS = [
    "a red star",
    "two blue cups on sand",
    "a big green tree to the left of a small black house",
    "a fish in the sea",
]


BOTH = pytest.mark.parametrize("clip", ["mini-vit", pytest.param("mini-resnet", marks=pytest.mark.slow)], indirect=True)


@pytest.fixture(scope="module")
def clip(request):
    return load_clip(getattr(request, "param", "mini-vit"), "mini")


@pytest.fixture(scope="module")
def batch(clip):
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return images, clip.preprocessing.tokenizer(TEXTS)


@pytest.fixture(scope="module")
def at_four_bits(clip, batch):
    return quantized(clip, batch, make_recipe("ptq4clip", bits=bits(4)))


@pytest.fixture(scope="module")
def at_eight_bits(clip, batch):
    return quantized(clip, batch, make_recipe("ptq4clip", bits=bits(8)))


def quantized(clip, batch, recipe, **options):
    model = copy.deepcopy(clip.model)
    return model, quantize(model, [batch], recipe, **options)


def bits(width):
    return BitWidths.resolve({"bits": width})


def error(model, clip, batch):
    with torch.no_grad():
        images = encode_image(model, batch[0]) - encode_image(clip.model, batch[0])
        texts = encode_text(model, batch[1]) - encode_text(clip.model, batch[1])
    return (images.norm() / encode_image(clip.model, batch[0]).norm()).item(), texts.norm().item()


@BOTH
def test_every_product_is_quantized_and_no_search_ends_above_its_start(at_four_bits):
    _, report = at_four_bits
    assert report.map.float_share == 0
    searched = [entry.name for entry in report.map.quantized if entry.kind != "embedding"]
    assert set(report.layers) == set(searched)
    for result in report.layers.values():
        assert result.after <= result.before
        assert 0 <= result.clipped <= 1
    assert sum(r.after for r in report.layers.values()) < 0.8 * sum(r.before for r in report.layers.values())


@BOTH
def test_embeddings_are_closer_to_float_than_those_of_min_max(clip, batch, at_four_bits):
    searched, _ = at_four_bits
    plain, _ = quantized(clip, batch, make_recipe("vanilla", bits=bits(4), attention_products=True))
    for ours, theirs in zip(error(searched, clip, batch), error(plain, clip, batch), strict=True):
        assert ours < theirs


def test_grids_follow_what_stands_in_front_of_a_layer(at_eight_bits):
    model, _ = at_eight_bits
    block = model.transformer.resblocks[0]
    assert isinstance(block.attn.av.input_quantizers["a"], TwinSoftmaxQuantizer)
    assert isinstance(block.attn.av.input_quantizers["b"], UniformQuantizer)
    behind = block.mlp.c_proj.input_quantizers["input"]
    assert isinstance(behind, TwinGeluQuantizer)
    assert behind.minimum == pytest.approx(-0.16361, abs=1e-4)  # QuickGELU, not GELU's -0.16997
    assert isinstance(block.mlp.c_fc.input_quantizers["input"], UniformQuantizer)
    assert isinstance(block.attn.qk, StartTokenScores)
    assert isinstance(block.attn.av, StartTokenAverage)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "grid"), [("uniform", UniformQuantizer), ("log2", LogQuantizer), ("log_sqrt2", LogQuantizer)]
)
def test_other_softmax_grids_can_be_chosen(clip, batch, option, grid):
    model, _ = quantized(clip, batch, make_recipe("ptq4clip", bits=bits(8), softmax_grid=option))
    assert isinstance(model.transformer.resblocks[0].attn.av.input_quantizers["a"], grid)


def test_the_start_token_is_a_constant_of_the_float_network(clip, batch, at_eight_bits):
    model, _ = at_eight_bits
    seen = {}
    explicit = copy.deepcopy(clip.model)
    make_explicit(explicit)
    explicit.transformer.resblocks[1].attn.qk.register_forward_pre_hook(lambda _, x: seen.update(keys=x[1]))
    with torch.no_grad():
        encode_text(explicit, batch[1])
    assert torch.allclose(model.transformer.resblocks[1].attn.qk.constant, seen["keys"][:1, ..., :1], atol=1e-5)


@pytest.mark.slow
@BOTH
def test_less_memory_means_more_passes_and_the_same_scales(clip, batch):
    free, one = quantized(clip, batch, make_recipe("ptq4clip", bits=bits(6)))
    tight, many = quantized(
        clip, batch, make_recipe("ptq4clip", bits=bits(6)), memory_limit_bytes=one.memory_bytes // 3
    )
    assert many.passes > one.passes
    assert many.memory_bytes <= one.memory_bytes // 3
    state, other = free.state_dict(), tight.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(state[name], other[name]) for name in state)
    with pytest.raises(CalibrationError, match=r"needs .* GB beside the model"):
        quantized(clip, batch, make_recipe("ptq4clip", bits=bits(6)), memory_limit_bytes=1000)


@pytest.mark.slow
@BOTH
def test_one_batch_or_several_is_the_same_set(clip, batch, at_eight_bits):
    model, _ = at_eight_bits
    halves = [tuple(x[:2] for x in batch), tuple(x[2:] for x in batch)]
    other = copy.deepcopy(clip.model)
    quantize(other, halves, make_recipe("ptq4clip", bits=bits(8)))
    with torch.no_grad():
        ours, theirs = encode_image(model, batch[0]), encode_image(other, batch[0])
    assert (ours - theirs).norm() < 0.02 * ours.norm()


def test_fisher_needs_pairs_and_more_than_one(clip, batch):
    with pytest.raises(CalibrationError, match="at least 2"):
        quantized(clip, tuple(x[:1] for x in batch), make_recipe("ptq4clip", objective="fisher"))
    with pytest.raises(CalibrationError, match="pairs"):
        quantized(clip, (batch[0], None), make_recipe("ptq4clip", objective="fisher", include=("clip.visual.*",)))


def test_fisher_at_clips_own_temperature_is_refused_where_it_is_one_hot():
    same = torch.eye(8)
    with pytest.raises(CalibrationError, match="one-hot"):
        contrastive_cotangents(same, same, temperature=0.01, seed=0)


def test_the_fisher_gradient_is_that_of_autograd_for_the_drawn_classes():
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.nn.functional.normalize(torch.randn(6, 5, generator=generator), dim=-1) for _ in range(2))
    by_image, by_text = contrastive_cotangents(image, text, temperature=0.5, seed=3)
    draw = drawn_by(3, 0)
    logits = image.double() @ text.double().T / 0.5
    rows = torch.multinomial(logits.softmax(1), 1, generator=draw)[:, 0]
    columns = torch.multinomial(logits.T.softmax(1), 1, generator=draw)[:, 0]
    a, b = image.double().requires_grad_(), text.double().requires_grad_()
    again = a @ b.T / 0.5
    loss = torch.nn.functional.cross_entropy(again, rows, reduction="sum")
    loss = loss + torch.nn.functional.cross_entropy(again.T, columns, reduction="sum")
    loss.backward()
    assert torch.allclose(by_image.double(), a.grad, atol=1e-6)
    assert torch.allclose(by_text.double(), b.grad, atol=1e-6)


@BOTH
def test_the_paper_leaves_attention_float(clip, batch):
    _, report = quantized(clip, batch, make_recipe("ptq4clip_paper", bits=bits(4)))
    assert {e.kind for e in report.map.quantized} <= {"conv2d", "linear"}
    assert not any("attn" in e.name or e.name.rpartition(".")[2] == "proj" for e in report.map.quantized)
    assert 0.1 < report.map.float_share < 0.9


@BOTH
@pytest.mark.slow
def test_the_baseline_has_uniform_grids_only(clip, batch):
    model, report = quantized(clip, batch, make_recipe("base_ptq", bits=bits(6)))
    grids = {type(m) for m in model.modules() if type(m).__name__.endswith("Quantizer")}
    assert grids == {UniformQuantizer}
    assert report.map.float_share == 0


@pytest.mark.slow
@BOTH
def test_layers_one_after_the_other_and_bias_correction_run(batch, clip):
    include = ("clip.visual.layer4.*",) if "resnet" in clip.name else ("clip.visual.transformer.resblocks.0.*",)
    for options in ({"sequential": True}, {"bias_correction": True}, {"store_bfloat16": True}, {"per_channel": False}):
        model, report = quantized(clip, batch, make_recipe("ptq4clip", bits=bits(6), include=include, **options))
        assert all(result.sqnr_db > 5 for result in report.layers.values())
        with torch.no_grad():
            assert encode_image(model, batch[0]).isfinite().all()


def test_options_from_the_command_line_are_checked():
    assert make_recipe("ptq4clip", search={"distance": "l2"}).stages[-1].distance == "l2"
    assert make_recipe("ptq4clip", search={"grid": {"count": 50}}).stages[-1].grid.count == 50
    with pytest.raises(ConfigError, match="softmax_grid must be one of twin"):
        make_recipe("ptq4clip", softmax_grid="triple")
    with pytest.raises(ConfigError, match="has no option speed"):
        make_recipe("ptq4clip", search={"speed": 1})


@pytest.mark.slow
@BOTH
def test_a_share_of_the_tokens_gives_the_same_ranges_and_needs_less_memory(clip, batch, at_four_bits):
    whole, full = at_four_bits
    part, report = quantized(clip, batch, make_recipe("ptq4clip", bits=bits(4), token_share=0.5))
    assert report.memory_bytes < full.memory_bytes
    assert set(report.layers) == set(full.layers)
    zero_points = [name for name in whole.state_dict() if name.endswith("input.zero_point")]
    assert zero_points
    assert all(torch.equal(whole.state_dict()[name], part.state_dict()[name]) for name in zero_points)
    assert all(result.after <= result.before for result in report.layers.values())


@pytest.mark.slow
@BOTH
def test_several_draws_are_averaged(clip, batch, at_four_bits):
    one, several = (
        at_four_bits[1].layers,
        quantized(clip, batch, make_recipe("ptq4clip", bits=bits(4), draws=4))[1].layers,
    )
    assert one.keys() == several.keys()
    ratio = torch.tensor([several[name].before / one[name].before for name in one])
    assert 0.5 < ratio.median() < 2  # a mean of squares, not a sum
    assert not torch.allclose(ratio, torch.ones_like(ratio), rtol=1e-3)


@pytest.mark.parametrize("options", [{"draws": 0}, {"token_share": 0.0}, {"token_share": 1.5}])
def test_impossible_options_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        make_recipe("ptq4clip", **options)
