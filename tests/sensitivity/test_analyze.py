"""Predictions and measurements against running the whole network by hand."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

import lit_clipq
from lit_clipq.errors import ConfigError
from lit_clipq.mini.world import picture, picture_captions
from lit_clipq.models import encode_image, encode_text
from lit_clipq.nn.swap import find_layers
from lit_clipq.recipes import BitWidths, make_recipe
from lit_clipq.sensitivity import analyze, worth_leaving
from lit_clipq.sensitivity.replay import block_of

BITS = BitWidths.resolve({"bits": 4})
SAMPLES = 8


@pytest.fixture(scope="module")
def loaded():
    return lit_clipq.load_clip("mini-vit", "mini")


@pytest.fixture(scope="module")
def batch(loaded):
    pixels = torch.stack([torch.from_numpy(picture("val", i)) for i in range(SAMPLES)])
    texts = loaded.preprocessing.tokenizer([picture_captions("val", i)[0] for i in range(SAMPLES)])
    return pixels.permute(0, 3, 1, 2) / 127.5 - 1, texts


@pytest.fixture(scope="module", params=["vanilla", pytest.param("ptq4clip", marks=pytest.mark.slow)])
def analysed(request, loaded, batch):
    options = {"attention_products": True} if request.param == "vanilla" else {}
    model = copy.deepcopy(loaded.model)
    recipe = make_recipe(request.param, bits=BITS, **options)
    analysis, placed = analyze(model, [batch], recipe, measure=-1, left_float=3)
    return model, recipe, analysis, placed


def embed(model, batch, tower):
    with torch.no_grad():
        rows = encode_image(model, batch[0]) if tower == "vision" else encode_text(model, batch[1])
        return F.normalize(rows.double(), dim=-1)


def squared_error(model, batch, tower, wanted):
    return ((embed(model, batch, tower) - wanted).square().sum() / wanted.square().sum()).item()


def test_every_product_and_operand_has_a_row(analysed):
    model, recipe, analysis, _ = analysed
    layers = find_layers({"clip": model})
    tables = [layer.name for layer in layers if layer.kind.is_table] if recipe.embeddings else []
    products = [layer.name for layer in layers if layer.kind.operands or layer.name in tables]
    assert [row.layer for row in analysis.rows if row.scope == "layer"] == products
    operands = [(row.layer, row.operand) for row in analysis.rows if row.scope == "operand"]
    assert len(operands) == len(set(operands)) == 2 * len(products) - len(tables)
    assert {row.layer for row in analysis.rows if row.scope == "tower"} == {"vision", "text"}
    assert {row.layer for row in analysis.rows if row.scope == "block"} == {block_of(name) for name in products} - {
        None
    }


def test_measured_errors_are_those_of_the_whole_network(analysed, batch, loaded):
    model, _, analysis, placed = analysed
    for row in [r for r in analysis.rows if r.scope == "layer"][::9]:
        wanted = embed(loaded.model, batch, row.tower)
        with placed.alone([row.layer]):
            assert squared_error(model, batch, row.tower, wanted) == pytest.approx(row.embedding, rel=2e-3)


def test_a_tower_measured_whole_is_the_quantized_network(analysed, batch, loaded):
    model, _, analysis, placed = analysed
    with placed.quantized.installed():
        for row in (r for r in analysis.rows if r.scope == "tower"):
            wanted = embed(loaded.model, batch, row.tower)
            expected = squared_error(model, batch, row.tower, wanted)
            assert row.embedding == pytest.approx(expected, rel=2e-3)


def test_a_layer_left_float_is_measured_in_the_quantized_tower(analysed, batch, loaded):
    model, _, analysis, placed = analysed
    row = next(r for r in analysis.worst(3) if r.tower == "vision")
    vision = [r.layer for r in analysis.rows if r.scope == "layer" and r.tower == "vision" and r.layer != row.layer]
    with placed.alone(vision):
        expected = squared_error(model, batch, "vision", embed(loaded.model, batch, "vision"))
    assert row.left_float == pytest.approx(expected, rel=2e-3)


def test_predictions_rank_layers_as_measurements_do(analysed):
    _, _, analysis, _ = analysed
    rows = [row for row in analysis.rows if row.scope == "layer"]
    off = [abs(10 * math.log10(row.embedding / row.predicted)) for row in rows]
    assert sorted(off)[len(off) // 2] < 4
    for tower in ("vision", "text"):
        own = [row for row in rows if row.tower == tower]
        by_prediction, by_measurement = (
            {r.layer for r in sorted(own, key=key, reverse=True)[:5]}
            for key in (lambda r: r.predicted, lambda r: r.embedding)
        )
        assert len(by_prediction & by_measurement) >= 3


def test_a_prediction_for_the_last_layer_is_exact_up_to_the_draw(loaded, batch):
    """Behind `visual.proj` only the normalisation follows: the squared error is that of the product, projected."""
    model = copy.deepcopy(loaded.model)
    recipe = make_recipe("vanilla", bits=BITS, include=("clip.visual.proj",))
    analysis, _ = analyze(model, [batch], recipe, measure=-1)
    (row,) = (r for r in analysis.rows if r.scope == "layer")
    assert row.predicted == pytest.approx(row.embedding, rel=0.25)


def test_the_float_network_stays_as_it_is(analysed, batch, loaded):
    model, *_ = analysed
    for tower in ("vision", "text"):
        assert squared_error(model, batch, tower, embed(loaded.model, batch, tower)) < 1e-11


def test_shares_add_up_and_blocks_are_the_sum_of_their_layers(analysed):
    _, _, analysis, _ = analysed
    for tower in ("vision", "text"):
        layers = [r for r in analysis.rows if r.tower == tower and r.scope == "layer"]
        assert math.fsum(r.share for r in layers) == pytest.approx(1)
        for block in (r for r in analysis.rows if r.tower == tower and r.scope == "block"):
            own = [r.predicted for r in layers if block_of(r.layer) == block.layer]
            assert block.predicted == pytest.approx(math.fsum(own))


def test_patterns_can_be_pasted_back_and_help(analysed, batch, loaded):
    _, recipe, analysis, _ = analysed
    patterns = analysis.patterns
    widths = BitWidths.resolve({"bits": 4}, dict(patterns.widths))
    options = {"attention_products": True} if recipe.name == "vanilla" else {}
    errors = []
    changed = ({}, {"exclude": patterns.exclude}, {"bits": widths})
    recipes = [make_recipe(recipe.name, **{"bits": BITS, **options, **changes}) for changes in changed]
    model = copy.deepcopy(loaded.model)
    for changes, quantized in zip(changed, lit_clipq.quantize_many(model, [batch], recipes), strict=True):
        with quantized.installed() as report:
            errors.append([squared_error(model, batch, t, embed(loaded.model, batch, t)) for t in ("vision", "text")])
        if "exclude" in changes:
            left = {entry.name for entry in report.map.entries if "excluded" in entry.reason}
            assert len(left) == len(patterns.exclude)
    for better in errors[1:]:
        assert all(after < 0.75 * before for before, after in zip(errors[0], better, strict=True))


def test_names_with_signs_of_patterns_are_escaped():
    from lit_clipq.sensitivity import Row

    rows = [Row("layer", "a[0]", "t", "all", 4, 1.0, 1.0), Row("operand", "a[0]", "t", "weight", 4, 1.0, 1.0)]
    found = worth_leaving(rows)
    assert found.exclude == ("a[[]0]",)
    assert dict(found.widths) == {"a[[]0]": "w8"}
    with pytest.raises(ConfigError, match="share must be above 0"):
        worth_leaving(rows, 0)


def test_outliers_are_found_where_they_are(loaded, batch):
    model = copy.deepcopy(loaded.model)
    norm = model.visual.transformer.resblocks[1].ln_2
    with torch.no_grad():
        norm.weight[7] *= 64
        norm.bias[7] *= 64
        model.visual.transformer.resblocks[1].mlp.c_fc.weight[:, 7] /= 64
    analysis, _ = analyze(model, [batch], make_recipe("vanilla", bits=BITS), measure=0, blocks=False)
    worst = max((r for r in analysis.ranges if r["tower"] == "vision"), key=lambda row: row["channel_ratio"])
    assert worst["layer"] == "clip.visual.transformer.resblocks.1.mlp.c_fc"
    assert worst["channels"][0]["channel"] == 7
    inputs = {}
    hook = model.visual.transformer.resblocks[1].mlp.c_fc.register_forward_pre_hook(
        lambda _, args: inputs.update(x=args[0])
    )
    embed(model, batch, "vision")
    hook.remove()
    assert (worst["low"], worst["high"]) == pytest.approx((inputs["x"].min().item(), inputs["x"].max().item()))
    assert [t["token"] for t in worst["tokens"]] == inputs["x"].abs().amax((0, 2)).topk(5).indices.tolist()


def test_attention_on_the_start_token_is_its_mean_weight(analysed):
    _, _, analysis, _ = analysed
    assert len(analysis.sinks) == 8
    assert all(0 < row["on_first"] < 1 for row in analysis.sinks)
    first_text = next(row for row in analysis.sinks if row["tower"] == "text")
    assert first_text["on_first"] > 1 / 32  # causal: the first row looks at nothing else


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "fisher"}, "Gauss-Newton"),
        ({"token_share": 0.5}, "token_share"),
        ({"bits": BitWidths.resolve({"bits": 32})}, "32 bits"),
    ],
)
def test_what_cannot_be_predicted_is_refused(options, message, loaded, batch):
    with pytest.raises(ConfigError, match=message):
        analyze(loaded.model, [batch], make_recipe("ptq4clip", **options))
