"""What measured best together is better than the search alone, costs no more bits, and is saved whole."""

import copy

import pytest
import torch

from lit_clipq import load_quantized, quantize, save_quantized
from lit_clipq.checkpoint import identify
from lit_clipq.models import encode_image, load_clip
from lit_clipq.recipes import BitWidths, make_recipe

pytestmark = pytest.mark.slow
INCLUDE = ("clip.visual.transformer.resblocks.[01].*", "clip.visual.proj")


@pytest.fixture(scope="module")
def clip():
    return load_clip("mini-vit", "mini")


@pytest.fixture(scope="module")
def pictures():
    return torch.rand(32, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def networks(clip, pictures):
    """Each recipe at W4A4: its network and the report."""
    found = {}
    for name in ("ptq4clip", "strong", "strong_mixed"):
        model = copy.deepcopy(clip.model)
        recipe = make_recipe(name, bits=BitWidths.resolve({"bits": 4}), include=INCLUDE)
        found[name] = model, quantize(model, [(pictures[:16], None)], recipe)
    return found


@torch.no_grad()
def error(model, clip, pictures):
    """Squared error of the embeddings on pictures that calibration has not seen."""
    return (encode_image(model, pictures[16:]) - encode_image(clip.model, pictures[16:])).square().sum().item()


def test_each_is_better_than_the_one_before_on_other_pictures(networks, clip, pictures):
    search, strong, mixed = (error(networks[name][0], clip, pictures) for name in networks)
    assert mixed < strong < search


def test_mixed_widths_take_no_more_bit_operations(networks):
    def operations(report):
        return sum(e.macs * (e.weight_bits or e.activation_bits) * e.activation_bits for e in report.map.quantized)

    plain, mixed = networks["ptq4clip"][1], networks["strong_mixed"][1]
    assert operations(mixed) <= operations(plain)
    assert len({e.activation_bits for e in mixed.map.quantized}) > 1


def test_saved_and_loaded_it_is_the_same_network(networks, clip, pictures, tmp_path):
    model, report = networks["strong_mixed"]
    recipe = make_recipe("strong_mixed", bits=BitWidths.resolve({"bits": 4}), include=INCLUDE)
    save_quantized(tmp_path / "strong", model, report=report, recipe=recipe, identity=identify(clip))
    other = load_quantized(tmp_path / "strong").model
    with torch.no_grad():
        assert torch.equal(encode_image(other, pictures[:4]), encode_image(model, pictures[:4]))
