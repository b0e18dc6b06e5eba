"""Channels are equalised by powers of two, and the float network stays what it was."""

import copy

import pytest
import torch
from torch import nn

from lit_clipq.api import quantize
from lit_clipq.calibration.channels import Channels
from lit_clipq.functional.granularity import PerChannel, PerTensor, extrema
from lit_clipq.models import encode_image, encode_text, fold_batchnorm, load_clip, make_explicit
from lit_clipq.models.attention.gpt2 import ExplicitGPT2
from lit_clipq.nn.attention import ExplicitAttention
from lit_clipq.nn.quantizer import UniformQuantizer
from lit_clipq.recipes import BitWidths, make_recipe
from lit_clipq.stages.equalize import Equalize, expected_error
from tests.models.conftest import CONFIGS, build

TEXTS = ["a red star", "two blue cups on sand", "a big green tree to the left of a small black house", "a fish"]
BITS = BitWidths.resolve({"bits": 8})


def pairs(clip, seed=0):
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
    return images, clip.preprocessing.tokenizer(TEXTS)


def equalised(model, batch, recipe=None):
    """Return the float network that calibration swapped layers into, the factors of LayerNorm gains, and the report."""
    plain = copy.deepcopy(model).eval()
    fold_batchnorm(plain)
    make_explicit(plain)
    changed = copy.deepcopy(model)
    report = quantize(changed, [batch], recipe or make_recipe("ptq4clip", bits=BITS))
    gains = {
        name: plain.get_parameter(f"{name}.weight") / module.weight
        for name, module in changed.named_modules()
        if isinstance(module, nn.LayerNorm)
    }
    return plain, changed, gains, report


def scaled(report):
    """Return what equalising says: expected error over that without scaling, by what makes the channels."""
    told = report.stages.get("equalize", {})
    return {} if "reason" in told else told


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("mini-vit", "mini-resnet")]
EVERY = pytest.mark.parametrize("run", ["mini-vit-outlier", *SLOW], indirect=True)


@pytest.fixture(scope="module")
def run(request):
    clip = load_clip(getattr(request, "param", "mini-vit-outlier"), "mini")
    return clip, *equalised(clip.model, pairs(clip))


@EVERY
def test_factors_are_powers_of_two_and_norms_between_blocks_stay(run):
    _, _, _, gains, report = run
    moved = {norm for norm, gain in gains.items() if bool((gain != 1).any())}
    assert moved
    assert all("resblocks" in norm for norm in moved)
    assert {f"clip.{norm}" for norm in moved} <= set(scaled(report))
    exponents = torch.cat([gain.log2() for gain in gains.values()])
    assert torch.equal(exponents, exponents.round())
    assert all(0 < error < 1 for error in scaled(report).values())


@pytest.mark.slow
def test_planted_outliers_are_found_and_taken_back(run):
    _, plain, _, gains, report = run
    assert len(scaled(report)) == 24  # two LayerNorms and an attention in each of eight blocks
    assert max(scaled(report).values()) < 0.1
    original = load_clip("mini-vit", "mini").model.state_dict()
    for norm, gain in gains.items():
        if "resblocks" in norm:
            planted = plain.get_parameter(f"{norm}.weight") / original[f"{norm}.weight"]
            found = gain.log2() - gain.log2().median()
            assert bool((found[planted >= 16] >= planted[planted >= 16].log2() - 2).all())


@EVERY
def test_gains_that_were_divided_and_weights_that_were_multiplied_belong_together(run):
    clip, _, changed, _, _ = run
    images, texts = pairs(clip, seed=1)
    with torch.no_grad():
        for encode, x in ((encode_image, images), (encode_text, texts)):
            float_, rounded = encode(clip.model, x), encode(changed, x)
            assert ((rounded - float_).norm() / float_.norm()).item() < 0.1


class Reading(nn.Module):
    """A block whose second layer reads the LayerNorm that the residual stream also takes, as in post-norm networks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.inner = nn.LayerNorm(width), nn.Linear(width, width)
        self.after, self.outer = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x):
        x = x + self.inner(self.before(x))
        x = self.after(x)
        return x + self.outer(x)


def test_channels_that_something_else_reads_stay(caplog):
    torch.manual_seed(0)
    network = nn.ModuleDict({"blocks": nn.ModuleList([Reading(16), Reading(16)])}).eval()
    for block in network["blocks"]:
        for norm in (block.before, block.after):
            norm.weight.data[3] = 50
    original = copy.deepcopy(network)
    x = torch.randn(6, 16)

    def forward(batch):
        for block in network["blocks"]:
            batch = block(batch)
        return batch

    before = forward(x)
    report = quantize({"net": network}, [x], make_recipe("ptq4clip", bits=BITS), forward=forward)
    assert sorted(scaled(report)) == ["net.blocks.0.before", "net.blocks.1.before"]
    assert "net.blocks.0.after makes stay as they are, as something else reads them (2 of 4)" in caplog.text
    for now, then in zip(network["blocks"], original["blocks"], strict=True):
        assert torch.equal(now.after.weight, then.after.weight)
        assert torch.equal(now.after.bias, then.after.bias)
        assert now.before.weight[3] < then.before.weight[3]
    assert (forward(x) - before).norm() < 0.05 * before.norm()


def test_only_layers_that_are_quantized_decide():
    clip = load_clip("mini-vit-outlier", "mini")
    recipe = make_recipe("ptq4clip", bits=BITS, include=("clip.visual.*",))
    _, _, gains, report = equalised(clip.model, pairs(clip), recipe)
    assert all(name.startswith("clip.visual.") for name in scaled(report))
    assert all(bool((gain == 1).all()) for norm, gain in gains.items() if not norm.startswith("visual."))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["ptq4clip_paper", "base_ptq"])
def test_published_recipes_leave_the_norms_as_they_are(recipe):
    clip = load_clip("mini-vit-outlier", "mini")
    _, _, gains, report = equalised(clip.model, pairs(clip), make_recipe(recipe, bits=BITS))
    assert not scaled(report)
    assert all(bool((gain == 1).all()) for gain in gains.values())


@pytest.mark.slow
def test_channels_that_are_zero_are_left_alone():
    clip = load_clip("mini-vit-outlier", "mini")
    norm = clip.model.visual.transformer.resblocks[1].ln_2
    norm.weight.data[5] = norm.bias.data[5] = 0
    _, changed, _, report = equalised(clip.model, pairs(clip))
    assert "clip.visual.transformer.resblocks.1.ln_2" in scaled(report)
    assert all(bool(p.isfinite().all()) for p in changed.state_dict().values() if p.is_floating_point())


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(8, 8), (4, 8), (8, 4), (6, 32), (32, 6)])
def test_the_expected_error_is_what_min_max_grids_make(weight_bits, activation_bits, per_channel):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 64, generator=generator) * torch.logspace(-1, 0.5, 64)
    weight = torch.randn(48, 64, generator=generator)
    factors = torch.stack([torch.ones(64), 2.0 ** torch.randint(-2, 3, (64,), generator=generator)]).double()
    found = expected_error(weight, Channels.of(x), weight_bits, activation_bits, factors, per_channel=per_channel)
    for factor, expected in zip(factors.float(), found, strict=True):
        rounded = []
        rows = PerChannel(0) if per_channel else PerTensor()
        sides = ((x / factor, activation_bits, PerTensor(), False), (weight * factor, weight_bits, rows, True))
        for side, bits, granularity, symmetric in sides:
            if bits != 32:
                grid = UniformQuantizer(bits, symmetric=symmetric, granularity=granularity)
                grid.set_range(*extrema(side, granularity))
                side = grid(side)
            rounded.append(side)
        actual = (rounded[0] @ rounded[1].T - x @ weight.T).square().sum(1).mean()
        assert actual.item() == pytest.approx(float(expected), rel=0.15)


def staged(model, batches, monkeypatch, **options):
    """Return the draft of a run that is stopped before equalising, and the function that equalises it."""
    rewrite, drafts = Equalize.rewrite, []

    class StopError(Exception):
        pass

    def stop(_, draft):
        drafts.append(draft)
        raise StopError

    with monkeypatch.context() as patch:
        patch.setattr(Equalize, "rewrite", stop)
        with pytest.raises(StopError):
            quantize(model, batches, make_recipe("ptq4clip", bits=BITS, **options))
    (draft,) = drafts
    return draft, lambda: rewrite(draft.stage(Equalize), draft)


@pytest.mark.parametrize("kind", CONFIGS)
def test_towers_of_every_kind_stay_the_same_to_the_bit(kind, monkeypatch):
    torch.manual_seed(0)
    model = build(CONFIGS[kind])
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.weight.data[1] = 30
    size = 64 if kind == "resnet" else 32

    def batch(seed):
        generator = torch.Generator().manual_seed(seed)
        texts = torch.randint(8, 58, (3, model.context_length), generator=generator)
        texts[:, 0], texts[:, -1] = 1, 7 if kind == "custom_text_eos" else 59
        return torch.rand(3, 3, size, size, generator=generator), texts

    exclude = ("clip.text_decoder.*",) if kind == "coca" else ()
    draft, go_on = staged(model, [batch(1)], monkeypatch, exclude=exclude)
    state = copy.deepcopy(model.state_dict())
    images, texts = batch(2)
    with torch.no_grad():
        before = encode_image(model, images), encode_text(model, texts)
        assert go_on()
        assert all(torch.equal(x, state[key]) for key, x in model.state_dict().items())
        with draft.scaled_in_place():
            assert any(not torch.equal(x, state[key]) for key, x in model.state_dict().items())
            after = encode_image(model, images), encode_text(model, texts)
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert all(torch.equal(x, state[key]) for key, x in model.state_dict().items())


@pytest.mark.parametrize("name", ["mini-vit-outlier", "mini-resnet"])
def test_the_float_network_stays_the_same_to_the_bit_and_removing_takes_it_back(name, monkeypatch):
    clip = load_clip(name, "mini")
    model, (images, texts) = clip.model, pairs(clip, seed=1)
    draft, go_on = staged(model, [pairs(clip)], monkeypatch)
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        before = encode_image(model, images), encode_text(model, texts)
        assert go_on()
        assert all(torch.equal(x, state[key]) for key, x in model.state_dict().items())
        draft.install()  # no layer is quantized yet
        after = encode_image(model, images), encode_text(model, texts)
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert any(not torch.equal(x, state[key]) for key, x in model.state_dict().items())
    with torch.no_grad():
        draft.remove()
    assert all(torch.equal(x, state[key]) for key, x in model.state_dict().items())


def test_a_run_that_fails_in_the_proof_leaves_the_weights_as_they_were(monkeypatch):
    clip = load_clip("mini-vit-outlier", "mini")
    draft, go_on = staged(clip.model, [pairs(clip)], monkeypatch)
    state, changed = copy.deepcopy(clip.model.state_dict()), []

    def fails(_):
        changed.extend(key for key, x in clip.model.state_dict().items() if not torch.equal(x, state[key]))
        raise KeyboardInterrupt

    draft.session.data.forward = fails
    with pytest.raises(KeyboardInterrupt):
        go_on()
    assert changed
    assert not draft.scalings
    assert all(torch.equal(x, state[key]) for key, x in clip.model.state_dict().items())


@pytest.mark.slow
def test_one_batch_given_twice_is_taken_twice():
    clip = load_clip("mini-vit", "mini")
    batch = pairs(clip)
    told = quantize(clip.model, [batch, batch], make_recipe("ptq4clip", bits=BITS)).stages["equalize"]
    assert told
    assert "reason" not in told


@pytest.mark.slow
def test_values_stay_where_channels_of_a_weight_share_a_scale_or_a_cache_keeps_them():
    clip = load_clip("mini-vit-outlier", "mini")
    _, _, _, report = equalised(clip.model, pairs(clip), make_recipe("ptq4clip", bits=BITS, per_channel=False))
    assert scaled(report)
    assert not any("attn" in name for name in scaled(report))
    assert ExplicitGPT2.hands_on_values
    assert not ExplicitAttention.hands_on_values
