"""Rotations leave the float function as it is, over towers of every kind, and what cannot be rotated is named."""

import copy
import logging

import pytest
import torch

from benchmarks.families import FAMILIES, enliven, sample, small_config
from lit_clipq import load_quantized, quantize, save_quantized
from lit_clipq.api import preview
from lit_clipq.checkpoint import identify
from lit_clipq.errors import ConfigError, ModelError
from lit_clipq.models import load_clip
from lit_clipq.models.attention.gpt2 import ExplicitGPT2
from lit_clipq.nn.rotation import RotatedNorm
from lit_clipq.nn.structure import replay
from lit_clipq.recipes import BitWidths, compose, make_recipe
from lit_clipq.stages.rotate import why_not_values
from tests.models.conftest import CONFIGS
from tests.stages.float_forms import embed, largest_change, prepared, same_state, tower

TEXTS = ["a red star", "two blue cups on sand", "a big green tree to the left of a small black house", "a fish"]
VISION, TEXT = "clip (vision tower) (residual)", "clip (text tower) (residual)"
NO_STREAM = "has no residual stream between LayerNorms"


def rotated(model, batch, other, **options):
    """Return what the report says, and check that the float function stays and comes back to the bit."""
    form, state = prepared(model, [batch], [{"rotate": options.pop("rotate", {})}], **options)
    before = embed(model, other)
    draft = form._draft
    for do, _ in draft.changes:
        do()
    after = embed(model, other)
    changed = not same_state(model, state)
    draft.undo_changes()
    assert same_state(model, state)
    assert changed == bool(draft.changes)
    assert largest_change(before, after) < 1e-5
    with form.installed():
        assert largest_change(before, embed(model, other)) > 1e-5
    assert same_state(model, state)
    told = dict(form.report.stages["rotate"])
    assert told.pop("float outputs")["relative change"] < 1e-5
    return told, form.report


EXPECTED = {
    "coca": {VISION: "visual.attn_pool reads the residual stream", TEXT: "text.ln_final sees the class token only"},
    "head_scale": {
        VISION: "visual.transformer.resblocks.0.ln_attn normalises what is added",
        "clip.visual.transformer.resblocks.0.attn (values)": "ln_inner stands between its values and out_proj",
        "clip.transformer.resblocks.0.attn (values)": "ln_inner stands between its values and out_proj",
    },
    "qk_norm": {"clip.visual.transformer.resblocks.0.attn (keys)": "ln_q stands between its projection and the scores"},
    "resnet": {VISION: f"visual (ModifiedResNet) {NO_STREAM}"},
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_float_function_stays_and_comes_back_to_the_bit(kind):
    model, batch, other = tower(kind)
    told, _ = rotated(model, batch, other, exclude=("clip.text_decoder.*",) if kind == "coca" else ())
    expected = EXPECTED.get(kind, {})
    for place, reason in expected.items():
        assert reason in told[place]["reason"]
    sizes = {VISION: 32, TEXT: 32}
    for place in {VISION, TEXT} - set(expected):
        assert told[place] == {"size": sizes[place]}
    heads = [found for place, found in told.items() if place.endswith(("(values)", "(keys)"))]
    assert any("size" in found for found in heads)


FAMILY = {
    "RoBERTa": {TEXT: "text.transformer normalises the residual stream itself (post-norm)"},
    "NLLB": {TEXT: "text.transformer normalises the residual stream itself (post-norm)"},
    "SigLIP": {},
    "EVA02": {
        "clip.visual.trunk.blocks.0.attn (keys)": "its queries and keys are rotated by position",
        "clip.visual.trunk.blocks.0.attn (values)": "norm stands between its values and out_proj",
    },
    "EVA01": {},
    "GAP ViT": {},
    "PE-Core": {},
    "BEiT": {VISION: NO_STREAM},
    "Swin V2": {
        VISION: NO_STREAM,
        "clip.visual.trunk.layers.0.blocks.0.attn (keys)": "what ExplicitWindowV2 does to its heads is not known",
    },
}


@pytest.mark.parametrize("title", FAMILY)
def test_families_of_timm_and_hugging_face(title, tmp_path):
    pytest.importorskip("transformers", minversion="5", reason="the text towers of Hugging Face")
    logging.disable(logging.WARNING)
    model = load_clip(str(small_config(next(f for f in FAMILIES if f.title == title), tmp_path))).model
    logging.disable(logging.NOTSET)
    enliven(model)
    told, _ = rotated(model, sample(model, 3), sample(model, 3, seed=1))
    for place, reason in FAMILY[title].items():
        assert reason in told[place]["reason"]
    for place in {VISION, TEXT} - set(FAMILY[title]):
        assert "size" in told[place]


def test_what_is_asked_for_and_cannot_be_done_is_refused_by_name_before_any_data():
    for kind, option, name in (
        ("resnet", "residual", r"the residual of clip \(vision tower\): visual \(ModifiedResNet\)"),
        ("head_scale", "values", r"the values of clip\.visual\.transformer\.resblocks\.0\.attn: ln_inner stands"),
        ("qk_norm", "keys", r"the keys of clip\.visual\.transformer\.resblocks\.0\.attn: ln_q stands between"),
    ):
        recipe = compose([{"rotate": {option: True}}, "grids", "ranges"], bits=BitWidths.resolve({"bits": 8}))
        model, batch, _ = tower(kind)
        for run in (lambda: preview(model, recipe), lambda: quantize(model, [batch], recipe)):  # noqa: B023
            with pytest.raises(ConfigError, match=f"rotate cannot rotate {name}"):
                run()
    stages = [{"rotate": {"residual": True}}, "grids", "ranges"]
    text_only = compose(stages, bits=BitWidths.resolve({"bits": 8}), exclude=("clip.visual.*",))
    assert preview(tower("resnet")[0], text_only).quantized


def test_values_that_a_cache_gets_stay():
    attention = ExplicitGPT2.__new__(ExplicitGPT2)
    torch.nn.Module.__init__(attention)
    assert why_not_values(attention) == "its values go into a cache that others change"


@pytest.mark.parametrize("early", ["smooth", "equalize"])
def test_it_must_stand_before_what_scales_single_channels(early):
    with pytest.raises(ConfigError, match=f"stage rotate must stand before {early}"):
        compose([early, "rotate", "grids", "search"])
    assert compose(["rotate", early, "grids", "search"])


def test_the_map_lists_the_products_at_the_borders():
    model, batch, other = tower("vit")
    _, report = rotated(model, batch, other)
    borders = {entry.name: entry for entry in report.map.entries if entry.kind == "rotation"}
    assert set(borders) == {f"clip.{name}.rotation" for name in ("visual.ln_pre", "visual.ln_post", "ln_final")}
    # 16 patches and the class token of width 32; of a text the pooled position alone
    assert [borders[f"clip.visual.{n}.rotation"].macs for n in ("ln_pre", "ln_post")] == [17 * 32 * 32] * 2
    assert borders["clip.ln_final.rotation"].macs == 32 * 32
    assert all(not entry.quantized for entry in borders.values())
    _, plain = rotated(model, batch, other, rotate={"residual": False})
    assert not [entry for entry in plain.map.entries if entry.kind == "rotation"]


@pytest.fixture(scope="module")
def outlier():
    clip = load_clip("mini-vit-outlier", "mini")
    images = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return clip, (images, clip.preprocessing.tokenizer(TEXTS * 2))


def test_planted_outliers_cost_eight_bits_little_once_rotated(outlier):
    clip, batch = outlier
    before = embed(clip.model, batch)
    bits = BitWidths.resolve({"bits": 8})
    errors = []
    for recipe in (make_recipe("vanilla", bits=bits), compose(["rotate", "grids", "ranges"], bits=bits)):
        model = copy.deepcopy(clip.model)
        quantize(model, [batch], recipe)
        errors.append(sum(float((x - y).norm() / x.norm()) for x, y in zip(before, embed(model, batch), strict=True)))
    assert errors[1] < 0.3 * errors[0]


def test_a_rotated_model_is_saved_and_loaded(outlier, tmp_path):
    clip, batch = outlier
    model = copy.deepcopy(clip.model)
    recipe = compose(["rotate", "smooth", "grids", "ranges"], bits=BitWidths.resolve({"bits": 8}))
    report = quantize(model, [batch], recipe)
    save_quantized(tmp_path / "saved", model, report=report, recipe=recipe, identity=identify(clip))
    loaded = load_quantized(tmp_path / "saved")
    assert isinstance(loaded.model.visual.ln_pre, RotatedNorm)
    assert all(torch.equal(x, y) for x, y in zip(embed(model, batch), embed(loaded.model, batch), strict=True))


def test_replays_that_do_not_fit_change_nothing(outlier):
    model = copy.deepcopy(outlier[0].model)
    entry = {"kind": "rotated_norm", "module": "clip.visual.ln_pre", "width": 128, "behind": True}
    undo = replay([entry], {}, {"clip": model})
    assert isinstance(model.visual.ln_pre, RotatedNorm)
    undo()
    assert not isinstance(model.visual.ln_pre, RotatedNorm)
    for bad in ({"module": "clip.visual.no"}, {"width": "128"}, {"width": 10**9}, {"behind": 1}, {"kind": "no"}):
        with pytest.raises(ModelError):
            replay([entry, {**entry, **bad}], {}, {"clip": model})
        assert not isinstance(model.visual.ln_pre, RotatedNorm)


def test_start_constants_are_those_of_rotated_keys():
    model, batch, _ = tower("vit")
    recipe = compose([{"rotate": {"residual": False}}, "grids", {"search": {"distance": "l2"}}])
    quantize(model, [batch], recipe)
    plain = tower("vit")[0]
    quantize(plain, [batch], compose(["grids", {"search": {"distance": "l2"}}]))
    one, other = (m.transformer.resblocks[0].attn.qk.constant for m in (model, plain))
    assert not torch.allclose(one, other, atol=1e-2)
    torch.testing.assert_close(one.norm(dim=2), other.norm(dim=2), rtol=1e-4, atol=1e-5)  # (1, heads, d, 1)


def test_values_that_stand_out_by_size_alone_become_what_they_would_have_been():
    def rotated_values(factor):
        model, batch, _ = tower("vit")
        attention = model.visual.transformer.resblocks[0].attn
        attention.in_proj_weight.data[64] *= factor  # a channel of the first head's values, and what reads it
        attention.in_proj_bias.data[64] *= factor
        attention.out_proj.weight.data[:, 0] /= factor
        form, _ = prepared(model, [batch], [{"rotate": {"keys": False, "residual": False}}])
        with form.installed():  # the weights are codes, the bias is as it was made
            bias = model.visual.transformer.resblocks[0].attn.qkv_proj.bias[64:80].clone()
        return bias / bias.norm()

    torch.testing.assert_close(rotated_values(64), rotated_values(1), rtol=1e-4, atol=1e-5)
