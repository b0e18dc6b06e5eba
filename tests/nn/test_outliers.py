"""Outlier channels apart from the others: float at one end, vector-wise at the other."""

import copy

import pytest
import torch
from torch import nn

from lit_clipq import load_quantized, quantize, save_quantized
from lit_clipq.checkpoint import identify, read_artefact
from lit_clipq.errors import ConfigError
from lit_clipq.models import load_clip
from lit_clipq.nn.outliers import OutlierLinear
from lit_clipq.recipes import BitWidths, compose, make_recipe

BITS = BitWidths.resolve({"bits": 8})
FEW = ("clip.visual.transformer.resblocks.0.*", "clip.transformer.resblocks.0.mlp.*")


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 12))


def rows():
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    x[:, [3, 11]] *= 40
    return x


def quantized(bits=8, **options):
    net = network()
    grids = {"inputs": "per_token", "symmetric": True, "restricted": True}
    recipe = compose(
        [{"grids": grids}, {"llm_int8": options}, "ranges"], bits=BitWidths.resolve({"bits": bits}), start_token=False
    )
    return net, quantize({"net": net}, [rows()], recipe, forward=lambda x: net(x))


NONE = "no channel of a linear layer with a grid for its input is an outlier"


def vector_wise(x, weight, bias, bits, outliers):
    """The equation in float64: `X_O W_O' + (row scales x output scales) X_int W_int'`."""
    x, weight = x.double(), weight.double()
    rest = [j for j in range(x.shape[1]) if j not in outliers]
    top = 2 ** (bits - 1) - 1
    rows, columns = x[:, rest].abs().amax(1, keepdim=True) / top, weight[:, rest].abs().amax(1) / top
    whole = (x[:, rest] / rows).round() @ (weight[:, rest] / columns[:, None]).round().T
    return x[:, outliers] @ weight[:, outliers].T + whole * rows * columns + bias.double()


@pytest.mark.parametrize(("threshold", "outliers"), [(6.0, [3, 11]), (float("inf"), [])])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_output_is_that_of_the_equation(threshold, outliers, bits):
    net, report = quantized(bits, threshold=threshold)
    float_layer = network()[0]
    expected = vector_wise(rows(), float_layer.weight, float_layer.bias, bits, outliers)
    difference = (net(rows()).double() - expected).abs()
    step = rows().abs().max() * float_layer.weight.abs().max() / 2 ** (bits - 1)
    assert (difference > 1e-4).float().mean() < 0.02  # ties that float32 decides otherwise
    assert difference.max() < step
    assert report.stages["llm_int8"] == ({"net.0": 2} if outliers else {"reason": NONE})
    assert report.map.float_share == len(outliers) / 16


def test_of_threshold_zero_the_network_is_float_to_the_bit():
    net, report = quantized(threshold=0.0)
    assert torch.equal(net(rows()), network()(rows()))
    assert report.map.float_share == 1


def test_a_quantile_names_a_share_of_the_channels_whatever_their_size():
    net, _ = quantized(quantile=0.87)
    assert net[0].outliers.tolist() == [3, 11]
    net, report = quantized(quantile=1.0)
    assert type(net[0]) is not OutlierLinear
    assert report.map.float_share == 0


def test_outliers_widen_no_range():
    errors = [(quantized(4, threshold=t)[0](rows()) - network()(rows())).square().mean() for t in (6.0, float("inf"))]
    assert errors[0] < 0.05 * errors[1]


def test_a_layer_that_is_not_frozen_computes_the_float_bits():
    original = network()[0]
    layer = OutlierLinear(original, None, None)
    layer.keep(torch.tensor([3, 11]))
    assert torch.equal(layer(rows()), original(rows()))


def test_it_is_saved_and_loaded_with_its_share_and_undone_to_the_bit(tmp_path):
    clip = load_clip("mini-vit-outlier", "mini")
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    texts = clip.preprocessing.tokenizer(["a red star", "two blue cups", "a fish", "three keys on sand"])
    identity, recipe = identify(clip), make_recipe("llm_int8", bits=BITS, include=FEW)
    report = quantize(clip.model, [(images, texts)], recipe)
    assert report.stages["llm_int8"]
    entry = next(e for e in report.map.quantized if e.name.endswith("visual.transformer.resblocks.0.mlp.c_fc"))
    assert 0 < entry.float_share < 0.1
    save_quantized(tmp_path / "saved", clip.model, report=report, recipe=recipe, identity=identity)
    loaded = load_quantized(tmp_path / "saved").model
    assert torch.equal(loaded.encode_image(images), clip.model.encode_image(images))
    assert torch.equal(loaded.encode_text(texts), clip.model.encode_text(texts))
    saved = read_artefact(tmp_path / "saved").content["map"]
    assert entry.float_share in [e["float_share"] for e in saved]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": -1.0}, "threshold of stage llm_int8 must be at least 0, got -1"),
        ({"threshold": float("nan")}, "must be at least 0, got nan"),
        ({"quantile": 1.5}, r"quantile of stage llm_int8 must be 0 to 1, got 1\.5"),
    ],
)
def test_nonsense_is_refused(options, message):
    from lit_clipq.stages.llm_int8 import LLMInt8

    with pytest.raises(ConfigError, match=message):
        LLMInt8(**options)


def test_stages_that_know_one_product_a_layer_are_refused():
    with pytest.raises(ConfigError, match="computes a layer as two products, which stage search cannot see"):
        compose(["grids", "llm_int8", "search"])


def test_several_forms_and_the_float_network_comes_back():
    net = network()
    before = copy.deepcopy(net)
    from lit_clipq import quantize_many

    recipe = compose(["grids", "llm_int8", "ranges"], start_token=False)
    (form,) = quantize_many({"net": net}, [rows()], [recipe], forward=lambda x: net(x))
    with form.installed():
        assert isinstance(net[0], OutlierLinear)
    assert torch.equal(net(rows()), before(rows()))
