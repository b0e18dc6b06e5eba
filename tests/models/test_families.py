"""Every architecture family of open_clip, and the timm towers that only a configuration file asks for.

A small member of each is loaded from local files, rewritten, quantized, saved and loaded. What stays float is compared
with torch's own count of operators, module by module, of the explicit float network.
"""

import copy
import logging
import re
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import lit_clipq
from benchmarks.families import FAMILIES, enliven, family_of, sample, small_config
from lit_clipq.checkpoint import identify, load_quantized, save_quantized
from lit_clipq.models import encode_image, encode_text, fold_batchnorm, load_clip, make_explicit
from lit_clipq.nn.swap import find_layers
from lit_clipq.recipes import make_recipe

pytest.importorskip("transformers", minversion="5", reason="the text towers of Hugging Face")

TOLERANCE = 1e-5  # float32, sums in another order; embeddings are of order one
BY_TITLE = {family.title: family for family in FAMILIES}


@pytest.fixture(scope="module", params=BY_TITLE)
def member(request, tmp_path_factory):
    """Title, loaded small member, batch."""
    path = small_config(BY_TITLE[request.param], tmp_path_factory.mktemp("family"))
    logging.disable(logging.WARNING)
    loaded = load_clip(str(path))
    logging.disable(logging.NOTSET)
    enliven(loaded.model)
    return request.param, loaded, sample(loaded.model, 4)


@torch.no_grad()
def embed(model, batch):
    """Both embeddings through open_clip's own forward."""
    return model.encode_image(batch[0], normalize=False), model.encode_text(batch[1], normalize=False)


class Both(torch.nn.Module):
    """Both towers in one forward, so that torch's counter names modules as the map does."""

    def __init__(self, clip):
        super().__init__()
        self.clip = clip

    def forward(self, images, tokens):
        return encode_image(self.clip, images), encode_text(self.clip, tokens)


def macs_by_module(model, batch):
    """Multiply-accumulates of a sample by module name, and of all, as torch counts them."""
    still = Both(copy.deepcopy(model).requires_grad_(False))  # torch's counter fails on views of tracked parameters
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        still(*batch)
    macs = {name: sum(flops.values()) / 2 / len(batch[0]) for name, flops in counter.get_flop_counts().items()}
    return {name.partition(".")[2]: value for name, value in macs.items()}, macs["Global"]


@pytest.mark.parametrize("name", open_clip.list_models())
def test_every_published_name_belongs_to_a_family(name):
    assert family_of(name) in FAMILIES


def test_the_page_of_models_has_a_row_for_every_family():
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    titles = [line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| ")]
    assert sorted(titles[1:]) == sorted(BY_TITLE)
    counts = {title: sum(family_of(name).title == title for name in open_clip.list_models()) for title in BY_TITLE}
    for family in FAMILIES:
        (row,) = (line for line in page.splitlines() if line.startswith(f"| {family.title} |"))
        names = row.split("|")[2]
        rest = re.search(r" and (\d+) more", names)
        shown = len(names.partition(" and ")[0].split(","))
        assert shown + int(rest[1] if rest else 0) == max(counts[family.title], 1)


def test_explicit_equals_the_original(member):
    _, loaded, batch = member
    expected = embed(loaded.model, batch)
    model = copy.deepcopy(loaded.model)
    fold_batchnorm(model)
    records = make_explicit(model)
    assert all(record.explicit for record in records)
    for found, wanted in zip(embed(model, batch), expected, strict=True):
        scale = wanted.abs().max()
        tolerance = TOLERANCE * scale.clamp(min=1)
        assert (wanted - wanted.roll(1, 0)).abs().max() > 100 * tolerance  # samples differ
        assert (found - wanted).abs().max() <= tolerance


@pytest.mark.parametrize("recipe", ["vanilla", pytest.param("ptq4clip", marks=pytest.mark.slow)])
def test_quantizes_saves_and_loads(member, recipe, tmp_path):
    _, loaded, batch = member
    model = copy.deepcopy(loaded.model)
    expected = encode_image(model, batch[0]), encode_text(model, batch[1])
    explicit = copy.deepcopy(model)
    fold_batchnorm(explicit)
    make_explicit(explicit)
    by_module, total = macs_by_module(explicit, batch)
    identity = identify(loaded)

    made = make_recipe(recipe, attention_products=True)
    report = lit_clipq.quantize(model, [batch], made)

    counted = sum(by_module.get(entry.name, 0) for entry in report.map.quantized)
    assert sum(entry.macs for entry in report.map.entries) == pytest.approx(total, rel=1e-6)
    assert report.map.float_share == pytest.approx(1 - counted / total, abs=1e-6)
    with torch.no_grad():
        found = encode_image(model, batch[0]), encode_text(model, batch[1])
        for rounded, wanted in zip(found, expected, strict=True):
            assert not torch.equal(rounded, wanted)
            assert (rounded - wanted).norm() < 0.5 * wanted.norm()  # a wrong product gives an error of the size of 1
        save_quantized(tmp_path / "saved", model, report=report, recipe=made, identity=identity)
        again = load_quantized(tmp_path / "saved").model
        assert torch.equal(encode_image(again, batch[0]), found[0])
        assert torch.equal(encode_text(again, batch[1]), found[1])


@pytest.mark.parametrize("name", ["pvt_v2_b0", "levit_128s", "xcit_nano_12_p16_224", "mvitv2_tiny"])
def test_towers_that_stay_partly_fused_say_how_much(name):
    """Attentions of classes that are not known, and layers whose weight a forward only reads."""
    network = timm.create_model(name, num_classes=3).eval().requires_grad_(False)
    enliven(network)
    fold_batchnorm(network)
    assert not all(record.explicit for record in make_explicit(network))
    images = torch.randn(1, *network.default_cfg["input_size"])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        torch.nn.ModuleDict({"net": network})["net"](images)
    counts = counter.get_flop_counts()
    kind = type(network).__name__
    called = {name for name in counts if name.startswith(f"{kind}.")}
    unreached = [layer.name for layer in find_layers({"net": network}) if f"{kind}.{layer.name[4:]}" not in called]
    made = make_recipe("vanilla", attention_products=True, exclude=tuple(unreached))
    report = lit_clipq.quantize({"net": network}, [images], made, forward=network, dry_run=True)
    layers = sum(sum(counts[f"{kind}.{entry.name[4:]}"].values()) for entry in report.map.quantized)
    assert report.map.float_share == pytest.approx(1 - layers / counter.get_total_flops(), abs=1e-6)
    assert report.map.float_share > 0
