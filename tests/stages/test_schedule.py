"""Stages walked as a recipe: what is collected together, what is shared, what is refused, and a stage of one's own."""

import copy
import json
import sys
from dataclasses import dataclass

import pytest
import torch

from lit_clipq import load_quantized, quantize, quantize_many, save_quantized
from lit_clipq.api import preview
from lit_clipq.calibration.needs import Need, Write
from lit_clipq.calibration.passes import CalibrationSet
from lit_clipq.checkpoint import identify, read_artefact
from lit_clipq.errors import CalibrationError, ConfigError, ModelError
from lit_clipq.models import load_clip
from lit_clipq.nn.structure import add_bias
from lit_clipq.recipes import BitWidths, compose, make_recipe, recipe_from_json
from lit_clipq.stages import STAGES, LayerStage, stage
from lit_clipq.stages.schedule import blocks_side_by_side
from lit_clipq.stages.stage import FloatStage

TEXTS = ["a red star", "two blue cups on sand", "a big green tree to the left of a small black house", "a fish"]
ALL = {"equalize": {}}, {"grids": {"softmax": "twin", "gelu": "twin"}}, {"search": {}}


def bits(**flags):
    return BitWidths.resolve(flags)


@pytest.fixture(scope="module")
def clip():
    return load_clip("mini-vit", "mini")


@pytest.fixture(scope="module")
def batch(clip):
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return images, clip.preprocessing.tokenizer(TEXTS)


def run(clip, batch, recipe, **options):
    model = copy.deepcopy(clip.model)
    return model, quantize(model, [batch], recipe, **options)


def same(one, other):
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


FEW = ("clip.visual.transformer.resblocks.[01].*", "clip.transformer.resblocks.0.*")


def test_stages_in_place_give_the_numbers_of_the_recipe_by_name(clip, batch):
    by_name, _ = run(clip, batch, make_recipe("ptq4clip", bits=bits(bits=4)))
    in_place, report = run(clip, batch, compose(ALL, bits=bits(bits=4)))
    assert same(by_name, in_place)
    assert report.recipe == "equalize+grids+search"
    assert set(report.stages) == {"equalize", "grids", "start_tokens"}


@pytest.mark.parametrize(
    ("stages", "told"),
    [
        ([], r"got 0 in \[none\]"),
        (["search"], r"expected one stage that assigns grids.* got 0 in \[search\]"),
        (["grids"], r"no stage in \[grids.*\] gives the grids their scales; add `search` or `ranges`"),
        (["search", "grids"], "stage grids works on grids and must stand before search, which works on layers"),
        (["grids", "equalize", "search"], "stage equalize works on the float network and must stand before grids"),
        (["grids", "search", "search"], "stage search is named twice"),
        (["grids", "serach"], "unknown stage 'serach'.* did you mean 'search'"),
        (
            [{"grids": {"softmax": "triple"}}, "search"],
            "softmax must be one of twin, uniform, log2, log_sqrt2, adalog, best; got 'triple'",
        ),
        ([{"grids": {"speed": 1}}, "search"], "stage grids has no option speed"),
        (["grids", {"search": {"grid": {"count": "many"}}}], 'grid.count of stage search: .*; got "many"'),
        (["grids", {"search": 4}], "the options of stage search must be a dictionary, got 4"),
        (["grids", {"search": {}, "ranges": {}}], "expected a stage as {name: options}"),
        (["grids", "bias_correction", "search"], "stage bias_correction needs scales that a stage in front of it"),
        (["start_tokens", "grids", "search"], "stage start_tokens needs grids that a stage in front of it has written"),
        (["grids", "search", "ranges"], "stage ranges must not stand behind search"),
        ([{"grids": {"gelu": "twin"}}, "ranges"], "stage ranges cannot calibrate gelu: twin of stage grids"),
        ([".a"], "stage .a cannot be imported"),
        ("grids", "stages must be a list"),
        (["grids", "os.path"], "expected a class of a stage"),
        (["grids", "no.such.Stage"], "stage no.such.Stage cannot be imported"),
    ],
)
def test_lists_that_cannot_be_run_are_refused_by_name(stages, told):
    with pytest.raises(ConfigError, match=told):
        compose(stages)


def test_widths_go_by_pattern_and_the_map_says_so(clip, batch):
    widths = BitWidths.resolve({"bits": 8}, {"clip.visual.*.mlp.*": "w4a8", "*.attn.qk": "float"})
    planned = preview(clip.model, make_recipe("ptq4clip", bits=widths))
    of = {entry.name: entry for entry in planned.entries}
    fc = of["clip.visual.transformer.resblocks.0.mlp.c_fc"]
    assert (fc.weight_bits, fc.activation_bits) == (4, 8)
    assert of["clip.transformer.resblocks.0.mlp.c_fc"].weight_bits == 8
    assert of["clip.visual.transformer.resblocks.0.attn.qk"].reason == "'*.attn.qk' is set to 32 bits"
    with pytest.raises(ConfigError, match=r"quantize\.widths pattern 'visual\.\*' matches none"):
        preview(clip.model, make_recipe("vanilla", bits=BitWidths.resolve({}, {"visual.*": 4})))


@pytest.mark.slow
def test_several_widths_from_one_collection_equal_runs_of_their_own(clip, batch):
    flags = [{"bits": 8}, {"bits": 4}, {"weight_bits": 4, "activation_bits": 8}, {"vision_bits": 8, "text_bits": 4}]
    recipes = [make_recipe("ptq4clip", bits=bits(**flag)) for flag in flags]
    model = copy.deepcopy(clip.model)
    images, texts = batch
    with torch.no_grad():
        before = model.encode_image(images), model.encode_text(texts)
    found = quantize_many(model, [batch], recipes)
    for recipe, quantized in zip(recipes, found, strict=True):
        alone, report = run(clip, batch, recipe)
        with quantized.installed() as shared:
            assert same(model, alone)
            assert shared.map == report.map
            assert shared.stages == report.stages
            assert {n: (r.before, r.after) for n, r in shared.layers.items()} == {
                n: (r.before, r.after) for n, r in report.layers.items()
            }
        with torch.no_grad():
            after = model.encode_image(images), model.encode_text(texts)
        # attention written out rounds otherwise than the fused one, and nothing else may have changed
        assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(before, after, strict=True))


@pytest.mark.slow
def test_the_float_network_comes_back_to_the_bit_and_can_be_quantized_again(clip, batch):
    model = copy.deepcopy(clip.model)
    recipe = make_recipe("ptq4clip", bits=bits(bits=4), include=FEW, start_token=False)
    (first,) = quantize_many(model, [batch], [recipe])
    floats = {name: value.clone() for name, value in model.state_dict().items()}
    first.install()
    assert not same_values(floats, model)
    quantized = {name: value.clone() for name, value in model.state_dict().items()}
    first.remove()
    assert same_values(floats, model)
    (second,) = quantize_many(model, [batch], [recipe])
    second.install()
    assert same_values(quantized, model)


def same_values(state, model):
    now = model.state_dict()
    return now.keys() == state.keys() and all(torch.equal(now[name], state[name]) for name in state)


def passes(monkeypatch, clip, batch, recipes):
    """How often a batch set is walked whole or in part, and how often the network runs."""
    runs = []
    numbered = CalibrationSet.numbered

    def counted(self, **options):
        runs.append(options)
        yield from numbered(self, **options)

    monkeypatch.setattr(CalibrationSet, "numbered", counted)
    quantize_many(copy.deepcopy(clip.model), [batch], recipes)
    return len(runs)


@pytest.mark.slow
def test_recipes_share_every_pass_over_the_batches(monkeypatch, clip, batch):
    few = [make_recipe("ptq4clip", bits=bits(bits=b), include=FEW, equalize=False) for b in (8, 6, 4)]
    one = passes(monkeypatch, clip, batch, few[:1])
    assert passes(monkeypatch, clip, batch, few) == one
    other = make_recipe("ptq4clip", bits=bits(bits=8), include=FEW, equalize=False, seed=1)
    assert passes(monkeypatch, clip, batch, [few[0], other]) == 2 * one


def test_a_layer_that_two_recipes_want_the_same_of_is_fitted_once(monkeypatch, clip, batch):
    fitted = []
    search = STAGES["search"]
    fit = search.fit
    monkeypatch.setattr(search, "fit", lambda self, task: (fitted.append(task.name), fit(self, task))[1])
    include = ("clip.visual.transformer.resblocks.0.mlp.*", "clip.transformer.resblocks.0.mlp.*")
    options = {"include": include, "equalize": False}
    flags = [{"vision_bits": v, "text_bits": t} for v in (8, 4) for t in (8, 4)]
    found = quantize_many(
        copy.deepcopy(clip.model), [batch], [make_recipe("ptq4clip", bits=bits(**f), **options) for f in flags]
    )
    assert len(fitted) == 8  # four layers at two widths, not at four pairs of widths
    assert all(len(q.report.layers) == 4 for q in found)


def test_blocks_of_both_towers_share_a_step():
    towers = {"clip.visual.conv1": "v", "clip.visual.b.0.x": "v", "clip.visual.b.0.y": "v", "clip.visual.b.1.x": "v"}
    towers |= {"clip.b.0.x": "t", "clip.b.1.x": "t", "clip.proj": "t"}
    assert blocks_side_by_side(list(towers), towers) == [
        ["clip.visual.conv1", "clip.b.0.x"],
        ["clip.visual.b.0.x", "clip.visual.b.0.y", "clip.b.1.x"],
        ["clip.visual.b.1.x", "clip.proj"],
    ]


@pytest.mark.slow
@pytest.mark.parametrize("propagate", ["layer", "block"])
def test_behind_quantized_layers_the_first_sees_what_it_did_and_later_ones_do_not(clip, batch, propagate):
    options = {"bits": bits(bits=4), "include": FEW, "equalize": False}
    model, report = run(clip, batch, make_recipe("ptq4clip", propagate=propagate, **options))
    free, alone = run(clip, batch, make_recipe("ptq4clip", **options))
    first, last = "clip.visual.transformer.resblocks.0.attn.qkv_proj", "clip.visual.transformer.resblocks.1.mlp.c_proj"
    assert report.layers[first].after == alone.layers[first].after
    assert report.layers[last].after != alone.layers[last].after
    assert report.passes == alone.passes + (len(report.layers) if propagate == "layer" else 2)
    for q in (model, free):
        assert q.encode_image(batch[0]).isfinite().all()


HALVE = '''"""A stage of one's own: scales are halved where that is better."""

from dataclasses import dataclass

import torch

from lit_clipq.calibration.needs import Need, Write
from lit_clipq.nn.modules import QWeighted
from lit_clipq.stages import LayerStage, LayerTask, stage


@stage("halve")
@dataclass(frozen=True)
class Halve(LayerStage):
    """Divide the scales of weights."""

    needs = frozenset({Need.OPERANDS})
    writes = frozenset({Write.SCALES})
    forbids = frozenset({"bias_correction"})

    by: float = 2.0
    """By what."""

    def fit(self, task: LayerTask) -> object:
        """Divide the scale of one weight; reports the mean of the scales."""
        module = task.module
        if not isinstance(module, QWeighted) or module.weight_quantizer is None:
            return None
        grid = module.weight_quantizer
        grid.load_parameters(grid.scale / self.by, grid.zero_point)
        return {"scale": float(grid.scale.mean()), "rows": sum(len(o.keys) for o in task.data.seen)}
'''


@pytest.fixture
def own_stage(tmp_path, monkeypatch):
    """A module with a stage, on the path; it is forgotten afterwards."""
    assert len(HALVE.splitlines()) <= 60
    (tmp_path / "halving.py").write_text(HALVE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "halving.Halve"
    STAGES.pop("halve", None)
    sys.modules.pop("halving", None)


def test_a_stage_of_ones_own_is_one_file_from_yaml_with_save_and_load(own_stage, batch, tmp_path):
    clip = load_clip("mini-vit", "mini")
    stages = [{"grids": {}}, {"search": {}}, {own_stage: {"by": 4.0}}]
    recipe = compose(stages, bits=bits(bits=8), include=FEW)
    identity = identify(clip)
    plain, _ = run(clip, batch, compose(stages[:2], bits=bits(bits=8), include=FEW))
    report = quantize(clip.model, [batch], recipe)
    scale = "visual.transformer.resblocks.0.mlp.c_fc.weight_quantizer.scale"
    assert torch.equal(clip.model.state_dict()[scale], plain.state_dict()[scale] / 4)
    told = report.stages["halve"]["clip.visual.transformer.resblocks.0.mlp.c_fc"]
    assert told["scale"] == pytest.approx(clip.model.state_dict()[scale].mean().item())
    assert told["rows"] > 0
    save_quantized(tmp_path / "saved", clip.model, report=report, recipe=recipe, identity=identity)
    assert read_artefact(tmp_path / "saved").recipe == recipe
    loaded = load_quantized(tmp_path / "saved")
    assert torch.equal(loaded.model.encode_image(batch[0]), clip.model.encode_image(batch[0]))
    with pytest.raises(ConfigError, match="stage halve must not stand behind bias_correction"):
        compose([*stages[:2], "bias_correction", own_stage])


@pytest.mark.slow
def test_an_artefact_of_a_stage_that_is_not_known_here_loads_and_keeps_its_record(own_stage, batch, tmp_path):
    clip = load_clip("mini-vit", "mini")
    recipe = compose(["grids", "search", {own_stage: {"by": 4.0}}], bits=bits(bits=8), include=FEW)
    identity = identify(clip)
    report = quantize(clip.model, [batch], recipe)
    save_quantized(tmp_path / "saved", clip.model, report=report, recipe=recipe, identity=identity)
    STAGES.pop("halve")
    saved = read_artefact(tmp_path / "saved")
    assert saved.recipe.to_json() == recipe.to_json()
    loaded = load_quantized(tmp_path / "saved")
    assert torch.equal(loaded.model.encode_image(batch[0]), clip.model.encode_image(batch[0]))
    with pytest.raises(ConfigError, match="stage halve is known here by the record of a saved model only"):
        preview(load_clip("mini-vit", "mini").model, saved.recipe)


@pytest.mark.parametrize("name", ["vanilla", "base_ptq", "ptq4clip", "ptq4clip_paper"])
def test_recipes_survive_json(name):
    recipe = make_recipe(name, bits=BitWidths.resolve({"bits": 6}, {"clip.visual.*": "w4"}), exclude=["*.proj"])
    assert recipe_from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


@dataclass(frozen=True)
class Negate(FloatStage):
    """Turn the sign of a row of the first linear layer and of what reads it: the function stays as it is."""

    needs = frozenset({Need.CHANNELS})
    writes = frozenset({Write.WEIGHTS})

    def rewrite(self, draft):
        fc = draft.session.layer["clip.visual.transformer.resblocks.0.mlp.c_fc"].module

        def turn():
            with torch.no_grad():
                fc.weight[0].neg_()

        draft.change(turn, turn)
        return {"rows": 1}


Negate.name = "negate"


def test_a_change_in_place_ends_what_was_seen_and_is_taken_back(clip, batch):
    model = copy.deepcopy(clip.model)
    recipe = compose([Negate(), "equalize", "grids", "search"], bits=bits(bits=8), include=FEW)
    (quantized,) = quantize_many(model, [batch], [recipe])
    weight = "visual.transformer.resblocks.0.mlp.c_fc.weight"
    assert torch.equal(model.state_dict()[weight], clip.model.state_dict()[weight])
    with quantized.installed():
        fc = model.visual.transformer.resblocks[0].mlp.c_fc
        cosine = torch.cosine_similarity(fc.weight[0], clip.model.visual.transformer.resblocks[0].mlp.c_fc.weight[0], 0)
        assert cosine < -0.9
    assert torch.equal(model.state_dict()[weight], clip.model.state_dict()[weight])


def test_needs_are_collected_ahead_as_far_as_nothing_spoils_them(monkeypatch, clip, batch):
    looked = []
    from lit_clipq.calibration.session import Session

    run_of = Session.run

    def recorded(self, observers, *rest):
        looked.append([type(observer).__name__ for observer in observers])
        run_of(self, observers, *rest)

    monkeypatch.setattr(Session, "run", recorded)
    quantize(copy.deepcopy(clip.model), [batch], make_recipe("ptq4clip", include=FEW, start_token=False))
    assert looked[0] == ["ChannelObserver", "OutputObserver", "SourceObserver"]
    assert looked[-1] == ["Recorder"]
    assert [names for names in looked[1:-1] if names != ["OutputObserver"]] == []


def test_registering_a_taken_name_is_refused():
    with pytest.raises(ValueError, match="expected a new name"):

        @stage("search")
        class Other(LayerStage):
            def fit(self, task):
                return task

    assert STAGES["search"].__module__ == "lit_clipq.stages.search"


@dataclass(frozen=True)
class Biased(LayerStage):
    """Give every layer a bias."""

    writes = frozenset({Write.BIAS})

    def fit(self, task):
        if task.module.bias is None:
            task.structure.append(dict(add_bias(task.module, task.name)))


Biased.name = "biased"


def test_forms_that_share_a_layer_each_say_what_was_added_to_it(batch, tmp_path):
    clip = load_clip("mini-vit", "mini")
    identity = identify(clip)
    include = ("clip.visual.proj", "clip.visual.transformer.resblocks.0.mlp.c_fc")
    recipe = compose([*ALL, Biased()], include=include)
    forms = quantize_many(clip.model, [batch], [recipe, recipe])
    for number, form in enumerate(forms):
        with form.installed() as report:
            assert [entry["layer"] for entry in report.structure] == ["clip.visual.proj"]
            folder = tmp_path / str(number)
            save_quantized(folder, clip.model, report=report, recipe=recipe, identity=identity)
            wanted = clip.model.encode_image(batch[0])
        assert torch.equal(load_quantized(folder).model.encode_image(batch[0]), wanted)


def test_a_form_is_not_installed_over_another(clip, batch):
    model = copy.deepcopy(clip.model)
    recipes = [make_recipe("ptq4clip", bits=bits(bits=b), include=FEW, start_token=False) for b in (8, 4)]
    eight, four = quantize_many(model, [batch], recipes)
    floats = {name: value.clone() for name, value in model.state_dict().items()}
    eight.install()
    with pytest.raises(ModelError, match="remove the form that is in place"):
        four.install()
    eight.remove()
    assert same_values(floats, model)
    with four.installed():
        assert not same_values(floats, model)


def test_frozen_networks_stay_frozen(clip, batch):
    model = copy.deepcopy(clip.model).requires_grad_(False)
    quantize(model, [batch], make_recipe("ptq4clip", bias_correction=True, include=FEW, start_token=False))
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("propagate", ["layer", "block"])
def test_what_stands_in_front_does_not_depend_on_the_memory_limit(clip, batch, propagate):
    options = {"bias_correction": True, "propagate": propagate, "equalize": False, "start_token": False}
    recipe = make_recipe("ptq4clip", bits=bits(bits=4), include=FEW, **options)
    whole, report = run(clip, batch, recipe)
    parts, other = run(clip, batch, recipe, memory_limit_bytes=report.memory_bytes // 3)
    assert other.passes > report.passes
    assert same(whole, parts)


def test_batches_of_another_form_need_to_say_where_their_texts_are(clip, batch):
    def forward(given, model):
        return {"image": model.encode_image(given["image"]), "text": model.encode_text(given["text"])}

    images, texts = batch
    recipe = make_recipe("vanilla", include=FEW)
    named = [{"image": images, "text": texts}]
    model = copy.deepcopy(clip.model)
    with pytest.raises(CalibrationError, match="give `texts=`, a function from a batch to its tokens"):
        quantize(model, named, recipe, forward=lambda given: forward(given, model))
    for wrong in (lambda given: given["image"], lambda given: given["text"][0], lambda given: given["text"][:2]):
        with pytest.raises(CalibrationError, match=r"expected the texts of a calibration batch as int64 \(B, L\)"):
            quantize(model, named, recipe, forward=lambda given: forward(given, model), texts=wrong)
    quantize(model, named, recipe, forward=lambda given: forward(given, model), texts=lambda given: given["text"])
    expected, _ = run(clip, batch, recipe)
    assert same(model, expected)


@pytest.mark.parametrize("option", [{"objective": "fisher"}, {"propagate": "layer"}, {"token_share": 0.5}])
def test_options_without_effect_are_refused(option):
    with pytest.raises(ConfigError, match=f"has no option {next(iter(option))}: none of its stages looks at operands"):
        make_recipe("vanilla", **option)


@pytest.mark.parametrize(
    "stages",
    [
        ["grids", "ranges"],
        ["smooth", "equalize", "grids", "ranges"],
        ["registers", "equalize", "grids", "ranges"],
        ["rotate", "smooth", "grids", "llm_int8", "ranges"],
        ["grids", "ranges", {"allocate": {"widths": ["w4a8"]}}],
    ],
    ids=str,
)
def test_passes_are_told_as_they_are_run(stages):
    clip = load_clip("mini-vit")
    batch = torch.rand(4, 3, 64, 64), clip.preprocessing.tokenizer(["a red star", "a fish", "a cup", "two trees"])
    (form,) = quantize_many(clip.model, [batch], [compose(stages)])
    assert form.report.passes == form.draft.session.passes
