"""Registers are keys and values that every query may attend to, kept where they help and nowhere else."""

import copy

import pytest
import torch

from lit_clipq import load_quantized, quantize, save_quantized
from lit_clipq.api import preview, quantize_many
from lit_clipq.calibration.session import Session
from lit_clipq.checkpoint import identify
from lit_clipq.errors import ConfigError
from lit_clipq.models import load_clip
from lit_clipq.nn.matmul import MatMul
from lit_clipq.nn.modules import QMatMul
from lit_clipq.nn.registry import layout_of
from lit_clipq.recipes import BitWidths, compose
from lit_clipq.stages import registers
from tests.stages.float_forms import embed, largest_change, prepared, same_state, tower

SEARCH = {"search": {"distance": "l2"}}


def test_products_with_a_prefix_are_attention_over_keys_and_values_in_front():
    q, k, v = (torch.randn(2, 3, 5, 4) for _ in range(3))
    keys, values = torch.randn(1, 3, 4, 2), torch.randn(1, 3, 2, 4)
    qk, av = MatMul(), MatMul()
    qk.prefix_keys, av.prefix_values = keys, values
    weights = qk(q, k.transpose(-2, -1)).softmax(-1)
    whole = torch.cat([keys.transpose(-2, -1).expand(2, -1, -1, -1), k], 2)
    expected = (q @ whole.transpose(-2, -1)).softmax(-1) @ torch.cat([values.expand(2, -1, -1, -1), v], 2)
    torch.testing.assert_close(av(weights, v), expected)
    quantized = QMatMul(qk, None, None), QMatMul(av, None, None)
    for layer, inputs in zip(quantized, ((q, k.transpose(-2, -1)), (weights, v)), strict=True):
        layout = layout_of(layer)
        a, b = layout.operands(inputs)
        # what is searched is the product of what is not of registers
        rest = a @ b if layout.scores else (a @ b + (weights[..., :2] @ values).flatten(0, 1))
        torch.testing.assert_close(layout.product(layer(*inputs)), rest)
    torch.testing.assert_close(quantized[1](quantized[0](q, k.transpose(-2, -1)).softmax(-1), v), expected)


def test_no_registers_are_the_identity_and_the_report_says_why():
    model, batch, other = tower("vit")
    before = embed(model, other)
    form, state = prepared(model, [batch], [{"registers": {"counts": []}}])
    assert form.report.stages["registers"] == {"count": 0, "reason": "no count is offered"}
    assert not form._draft.changes
    assert same_state(model, state)
    assert largest_change(before, embed(model, other)) < 1e-5  # attention is written out now
    resnet, batch, _ = tower("resnet")
    told = prepared(resnet, [batch], ["registers"])[0].report.stages["registers"]
    assert told["reason"] == "no vision tower with a residual stream between LayerNorms is quantized"
    pictures, texts = tower("vit")[1]
    told = prepared(model, [(pictures[:1], texts[:1])], ["registers"])[0].report.stages["registers"]
    assert told == {"count": 0, "reason": "no picture to be judged on"}
    recipe = compose([{"registers": {"blocks": [0, 7]}}, "grids", "ranges"], bits=BitWidths.resolve({"bits": 8}))
    for run in (lambda: preview(model, recipe), lambda: quantize_many(model, [(pictures, texts)], [recipe])):
        with pytest.raises(ConfigError, match="names block 7, but the vision tower has 2"):
            run()


def test_what_does_not_help_on_pictures_held_out_is_not_kept(monkeypatch):
    model, batch, _ = tower("vit")
    monkeypatch.setattr(registers._Trial, "errors", lambda _, prefixes: (0.0 if prefixes else 1.0, 1.0))
    form, state = prepared(model, [batch], ["registers"])
    assert form.report.stages["registers"]["reason"] == "none is better on pictures held out"
    assert same_state(model, state)


@pytest.fixture
def helpful(monkeypatch):
    """Let two registers from the second block on be the best that there is."""

    def errors(_, prefixes):
        counts = {prefix.keys.shape[-1] for prefix in prefixes.values()}
        best = len(prefixes) == 1 and counts == {2}
        return (0.0, 0.0) if best else (1.0, 1.0)

    monkeypatch.setattr(registers._Trial, "errors", errors)


@pytest.mark.usefixtures("helpful")
def test_registers_are_the_means_of_the_largest_tokens():
    model, batch, _ = tower("vit")
    form, state = prepared(model, [batch], [{"registers": {"counts": [2, 1]}}])
    told = form.report.stages["registers"]
    assert (told["block"], told["count"]) == ("clip.visual.transformer.resblocks.1.attn", 2)
    assert -1 <= told["float outputs"]["cosine"] < 1
    block, seen = model.visual.transformer.resblocks[1], {}
    handles = [
        block.ln_1.register_forward_pre_hook(lambda _, x: seen.update(x=x[0])),
        block.attn.qk.register_forward_pre_hook(lambda _, x: seen.update(k=x[1])),
        block.attn.av.register_forward_pre_hook(lambda _, x: seen.update(v=x[1])),
    ]
    embed(model, batch)
    for handle in handles:
        handle.remove()
    keys, values = torch.zeros(2, 16, 2), torch.zeros(2, 2, 16)
    for picture in range(3):
        largest = seen["x"][picture].abs().amax(1).argsort(descending=True)[:2]
        for i, token in enumerate(largest):
            keys[:, :, i] += seen["k"][picture, :, :, token] / 3
            values[:, i] += seen["v"][picture, :, token] / 3
    with form.installed():
        attention = model.visual.transformer.resblocks[1].attn
        torch.testing.assert_close(attention.qk.prefix_keys[0], keys)
        torch.testing.assert_close(attention.av.prefix_values[0], values)
        assert model.visual.transformer.resblocks[0].attn.qk.prefix_keys is None
    assert same_state(model, state)
    rows = {entry.name: entry.macs for entry in form.report.map.entries if entry.kind == "registers"}
    # 17 queries, 2 registers, a width of 32
    assert rows == {f"{told['block']}.{part}.registers": pytest.approx(17 * 2 * 32) for part in ("qk", "av")}


@pytest.mark.usefixtures("helpful")
@pytest.mark.parametrize("recipe", [["ranges"], [SEARCH]], ids=["ranges", "search"])
@pytest.mark.parametrize("products", [True, False])
def test_a_model_with_registers_is_quantized_saved_and_loaded(tmp_path, recipe, products):
    clip = load_clip("mini-vit", "mini")
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    batch = images, clip.preprocessing.tokenizer(["a red star", "two cups", "a fish", "three green keys"])
    model, identity = copy.deepcopy(clip.model), identify(clip)
    grids = {"grids": {"softmax": "twin"}} if recipe == [SEARCH] else "grids"
    stages = [{"registers": {"counts": [2]}}, "equalize", grids, *recipe]
    bits = BitWidths.resolve({"bits": 8})
    made = compose(stages, bits=bits, attention_products=products, include=("clip.visual.*",))
    (form,) = quantize_many(model, [batch], [made])
    report, draft = form.report, form._draft
    assert report.stages["registers"]["count"] == 2
    for do, _ in draft.changes:
        do()
    expected = embed(model, batch)
    draft.undo_changes()
    form.install()
    found = embed(model, batch)
    assert all(((x - y).norm() / x.norm()) < 0.1 for x, y in zip(expected, found, strict=True))
    save_quantized(tmp_path / "saved", model, report=report, recipe=made, identity=identity)
    loaded = load_quantized(tmp_path / "saved")
    assert all(torch.equal(x, y) for x, y in zip(found, embed(loaded.model, batch), strict=True))


@pytest.mark.parametrize(("options", "said"), [({"counts": [0]}, "counts of"), ({"blocks": [-1]}, "blocks of")])
def test_options_out_of_range_are_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        compose([{"registers": options}, "grids", "search"])


@pytest.mark.parametrize("early", ["smooth", "equalize"])
def test_they_must_stand_before_what_scales_values(early):
    with pytest.raises(ConfigError, match=f"stage registers must not stand behind {early}"):
        compose([early, "registers", "grids", "search"])


def test_a_run_that_fails_leaves_no_registers_behind(monkeypatch):
    model, batch, _ = tower("vit")
    runs = []

    def fails(self):
        runs.append(model.visual.transformer.resblocks[1].attn.qk.prefix_keys)
        if runs[-1] is not None:
            raise KeyboardInterrupt
        return original(self)

    original = Session.outputs_now
    monkeypatch.setattr(Session, "outputs_now", fails)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, [batch], compose(["registers", "grids", "ranges"], bits=BitWidths.resolve({"bits": 8})))
    assert runs[-1] is not None
    assert model.visual.transformer.resblocks[1].attn.qk.prefix_keys is None
