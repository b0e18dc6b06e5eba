"""Saving and loading: bit-identical outputs, sizes, and every way an artefact can be wrong."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lit_clipq
from lit_clipq.checkpoint import check_target, identify, read_artefact, state_hash
from lit_clipq.checkpoint.folder import write_folder
from lit_clipq.errors import ConfigError, ModelError
from lit_clipq.functional.granularity import PerGroup, PerToken, extrema
from lit_clipq.nn.embedding import QEmbedding
from lit_clipq.nn.modules import QModule
from lit_clipq.nn.quantizer import LogQuantizer, TwinGeluQuantizer, TwinSoftmaxQuantizer, UniformQuantizer
from lit_clipq.nn.size import stored_bytes
from lit_clipq.recipes import BitWidths, make_recipe

JSON, TENSORS = "quantization.json", "model.safetensors"


def inputs(clip, count=2):
    size = clip.model.visual.image_size
    size = size if isinstance(size, tuple) else (size, size)
    images = torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(1))
    return images, clip.preprocessing.tokenizer(["a red square", "two dogs left of a green circle"][:count])


@torch.no_grad()
def embeddings(clip):
    images, texts = inputs(clip)
    return clip.model.encode_image(images), clip.model.encode_text(texts)


def assert_same_outputs(found, expected):
    for a, b in zip(embeddings(found), embeddings(expected), strict=True):
        assert torch.equal(a, b)


def make(name="mini-vit", recipe=None, *, precision="fp32", **widths):
    """A quantized CLIP with random weights, what quantized it, and who it was."""
    torch.manual_seed(0)
    clip = lit_clipq.load_clip(name, precision=precision)
    identity = identify(clip)
    recipe = recipe or make_recipe("vanilla", bits=BitWidths.resolve(widths), attention_products=True, embeddings=True)
    images, texts = inputs(clip)
    batch = images.to(clip.model.visual.conv1.weight.dtype), texts
    report = lit_clipq.quantize(clip.model, [batch], recipe)
    return clip, {"report": report, "recipe": recipe, "identity": identity}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One saved artefact, not to be changed."""
    clip, facts = make(bits=4)
    path = tmp_path_factory.mktemp("shared") / "artefact"
    lit_clipq.save_quantized(path, clip.model, **facts)
    return clip, facts, path


@pytest.fixture
def artefact(shared, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(shared[2], tmp_path / "artefact")


@pytest.mark.parametrize("name", ["mini-vit", "mini-resnet"])
@pytest.mark.parametrize(
    "widths",
    [
        {"bits": 8},
        {"bits": 6},
        {"bits": 4},
        {"bits": 3},
        {"bits": 2},
        {"bits": 11},
        {"bits": 16},
        {"weight_bits": 4, "activation_bits": 32},
        {"weight_bits": 32, "activation_bits": 8},
        {"vision_bits": 5, "text_bits": 32},
    ],
    ids=lambda widths: "-".join(f"{key}{value}" for key, value in widths.items()),
)
def test_a_loaded_model_gives_the_same_bits(tmp_path, name, widths):
    clip, facts = make(name, **widths)
    lit_clipq.save_quantized(tmp_path / "artefact", clip.model, **facts)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    loaded = lit_clipq.load_quantized(tmp_path / "artefact")
    assert torch.equal(torch.get_rng_state(), before)
    assert_same_outputs(loaded, clip)
    assert (loaded.name, loaded.pretrained) == (name, None)
    assert not loaded.model.training
    assert loaded.preprocessing.fingerprint == clip.preprocessing.fingerprint
    assert state_hash(loaded.model) == state_hash(clip.model)


def test_every_quantizer_survives(tmp_path):
    """Twin, log, per-token and per-group grids, put in by hand; and a buffer that a subclass keeps."""
    clip, facts = make(bits=4)
    block = clip.model.transformer.resblocks[0]
    block.attn.av.input_quantizers["a"] = TwinSoftmaxQuantizer(4)
    block.attn.av.input_quantizers["a"].split = torch.tensor(0.125)
    block.attn.qk.input_quantizers["b"] = UniformQuantizer(6, symmetric=False, granularity=PerToken())
    block.mlp.c_proj.input_quantizers["input"] = TwinGeluQuantizer(5, -0.16361)
    block.mlp.c_proj.input_quantizers["input"].positive_step = torch.tensor(0.037)
    clip.model.visual.transformer.resblocks[1].attn.av.input_quantizers["a"] = LogQuantizer(4, 2)
    lit_clipq.save_quantized(tmp_path / "artefact", clip.model, **facts)
    loaded = lit_clipq.load_quantized(tmp_path / "artefact")
    assert_same_outputs(loaded, clip)
    before = {name: str(module) for name, module in clip.model.named_modules() if isinstance(module, QModule)}
    assert before == {name: str(module) for name, module in loaded.model.named_modules() if isinstance(module, QModule)}


def test_layers_that_hold_constants_keep_them(tmp_path):
    clip, facts = make(recipe=lit_clipq.recipes.make_recipe("ptq4clip", embeddings=True))
    constants = [name for name in clip.model.state_dict() if name.endswith(".constant")]
    assert constants
    lit_clipq.save_quantized(tmp_path / "artefact", clip.model, **facts)
    loaded = lit_clipq.load_quantized(tmp_path / "artefact")
    assert_same_outputs(loaded, clip)
    assert read_artefact(tmp_path / "artefact").recipe == facts["recipe"]


@pytest.mark.parametrize("precision", ["bf16", "pure_fp16"])
def test_what_stays_float_keeps_its_type(tmp_path, precision):
    clip, facts = make(precision=precision, bits=8)
    lit_clipq.save_quantized(tmp_path / "artefact", clip.model, **facts)
    loaded = lit_clipq.load_quantized(tmp_path / "artefact")
    types = {name: value.dtype for name, value in clip.model.state_dict().items()}
    assert types == {name: value.dtype for name, value in loaded.model.state_dict().items()}
    texts = inputs(clip)[1]
    assert torch.equal(loaded.model.encode_text(texts), clip.model.encode_text(texts))


def test_the_folder_is_all_that_is_needed(tmp_path):
    """A configuration file with a vocabulary beside it, both gone when the artefact is loaded from another place."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("mini-vit.json", "mini_bpe.txt.gz"):
        shutil.copy(lit_clipq.mini.CONFIG_DIR / name, source)
    clip, facts = make(str(source / "mini-vit.json"), bits=8)
    lit_clipq.save_quantized(tmp_path / "artefact", clip.model, **facts)
    texts = ["a red square left of a dog"]
    expected = clip.preprocessing.tokenizer(texts)
    shutil.rmtree(source)
    moved = (tmp_path / "artefact").rename(tmp_path / "moved")
    loaded = lit_clipq.load_quantized(moved)
    assert torch.equal(loaded.preprocessing.tokenizer(texts), expected)
    assert_same_outputs(loaded, clip)


def test_it_loads_into_a_float_network_that_is_there(shared):
    clip, facts, path = shared
    torch.manual_seed(5)
    other = lit_clipq.load_clip("mini-vit")
    report = read_artefact(path).load_into(other.model)
    assert_same_outputs(other, clip)
    assert report.map == facts["report"].map
    assert report.quantized_bytes == facts["report"].quantized_bytes
    assert report.float_bytes == facts["report"].float_bytes
    assert report.samples == facts["report"].samples
    assert report.seconds == 0


def test_the_recipe_comes_back_equal(shared):
    _, facts, path = shared
    assert read_artefact(path).recipe == facts["recipe"]


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "factor"), [(8, 3.9), (4, 7.6)])
def test_vit_b_32_shrinks_and_its_size_is_predicted(tmp_path, bits, factor):
    clip, facts = make("ViT-B-32", bits=bits)
    assert len(facts["report"].map.quantized) == 147 + 1
    lit_clipq.save_quantized(tmp_path / "artefact", clip.model, **facts)
    on_disk = sum(file.stat().st_size for file in (tmp_path / "artefact").iterdir())
    predicted = stored_bytes(clip.model)
    assert predicted == facts["report"].quantized_bytes
    assert abs(on_disk - predicted) < 0.01 * predicted + 100_000
    assert facts["report"].float_bytes / on_disk > factor


def test_tensors_that_share_memory_are_stored_once(tmp_path):
    def share(clip):
        first, second = clip.model.visual.transformer.resblocks[:2]
        second.mlp.c_fc = first.mlp.c_fc

    clip, facts = make(bits=4)
    share(clip)
    lit_clipq.save_quantized(tmp_path / "artefact", clip.model, **facts)
    names = [name for name in load_file(tmp_path / "artefact" / TENSORS) if name.endswith("c_fc.weight_codes")]
    blocks = len(clip.model.visual.transformer.resblocks) + len(clip.model.transformer.resblocks)
    assert len(names) == blocks - 1
    loaded = lit_clipq.load_clip("mini-vit")
    share(loaded)
    read_artefact(tmp_path / "artefact").load_into(loaded.model)
    assert_same_outputs(loaded, clip)


# ---- writing


def test_an_artefact_is_replaced_and_nothing_else_stays(shared, artefact):
    clip, facts = make(bits=8)
    lit_clipq.save_quantized(artefact, clip.model, **facts)
    assert_same_outputs(lit_clipq.load_quantized(artefact), clip)
    assert [path.name for path in artefact.parent.iterdir()] == ["artefact"]
    assert (artefact / JSON).stat().st_mode & 0o777 == (artefact / TENSORS).stat().st_mode & 0o777


def test_a_failed_save_leaves_the_old_artefact(shared, artefact, monkeypatch):
    before = {file.name: file.read_bytes() for file in artefact.iterdir()}

    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("lit_clipq.checkpoint.folder.save_file", full)
    clip, facts, _ = shared
    with pytest.raises(ConfigError, match="no space left"):
        lit_clipq.save_quantized(artefact, clip.model, **facts)
    assert {file.name: file.read_bytes() for file in artefact.iterdir()} == before
    assert [path.name for path in artefact.parent.iterdir()] == ["artefact"]


def test_a_failed_move_brings_the_old_artefact_back(artefact, monkeypatch):
    path_type = type(artefact)
    rename = path_type.rename

    def fail_for_new(self, target):
        if self.name == "new":
            raise OSError("moved away")
        return rename(self, target)

    monkeypatch.setattr(path_type, "rename", fail_for_new)
    with pytest.raises(ConfigError, match="moved away"):
        write_folder(artefact, {}, {"x": torch.zeros(1)}, None)
    monkeypatch.undo()
    lit_clipq.load_quantized(artefact)


def test_folders_of_other_things_are_not_overwritten(artefact, tmp_path):
    (artefact / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"notes\.txt, which is no part of a quantized model"):
        check_target(artefact)
    other = tmp_path / "other"
    other.mkdir()
    check_target(other)
    (other / TENSORS).write_bytes(b"somebody's weights")
    with pytest.raises(ConfigError, match="is no quantized model of this program"):
        check_target(other)
    with pytest.raises(ConfigError, match="is a file"):
        check_target(other / TENSORS)
    with pytest.raises(ConfigError, match="cannot be saved"):
        check_target(other / TENSORS / "below")


def test_only_a_quantized_network_is_saved(tmp_path):
    clip, facts = make(bits=8)
    with pytest.raises(ConfigError, match="expected a quantized network"):
        lit_clipq.save_quantized(tmp_path / "x", lit_clipq.load_clip("mini-vit").model, **facts)
    with pytest.raises(ModelError, match="call `identify` before `quantize`"):
        identify(clip)


# ---- reading


def content_of(artefact):
    return json.loads((artefact / JSON).read_text())


def seal(artefact, content):
    """Write the JSON with checksums that fit, as only a bug would."""
    content = {key: value for key, value in content.items() if key != "checksum"}
    content["files"][TENSORS] = hashlib.sha256((artefact / TENSORS).read_bytes()).hexdigest()
    checksum = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (artefact / JSON).write_text(json.dumps({**content, "checksum": checksum}))


def refused(artefact, match):
    with pytest.raises(ModelError, match=match) as caught:
        lit_clipq.load_quantized(artefact)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [TENSORS, JSON, "vocabulary.txt.gz"])
def test_missing_files_are_named(artefact, name):
    (artefact / name).unlink()
    refused(artefact, f"{name} does not exist")


def test_a_missing_folder_is_named(tmp_path):
    refused(tmp_path / "absent", "expected a quantized model in .*absent")


@pytest.mark.parametrize(
    "spoil", [lambda b: b[:-1], lambda b: b[:100], lambda b: b[:-9] + b"x" + b[-8:], lambda b: b[:0]]
)
def test_cut_or_edited_tensors_are_refused(artefact, spoil):
    (artefact / TENSORS).write_bytes(spoil((artefact / TENSORS).read_bytes()))
    refused(artefact, r"model\.safetensors was cut short or edited: its checksum is wrong")


@pytest.mark.parametrize("spoil", [lambda text: text[:500], lambda text: text[:0], lambda text: "\x00" + text])
def test_damaged_json_is_refused(artefact, spoil):
    (artefact / JSON).write_text(spoil((artefact / JSON).read_text()))
    refused(artefact, "is damaged and cannot be read as JSON")


def test_json_that_is_not_text_is_refused(artefact):
    (artefact / JSON).write_bytes(b"\xff\xfe\x00")
    refused(artefact, "is damaged")


@pytest.mark.parametrize("text", ["[]", "{}", '{"format": "other"}'])
def test_json_of_something_else_is_refused(artefact, text):
    (artefact / JSON).write_text(text)
    refused(artefact, "does not describe a quantized model")


def test_edited_json_is_refused(artefact):
    text = (artefact / JSON).read_text()
    (artefact / JSON).write_text(text.replace('"bits": 4', '"bits": 5', 1))
    refused(artefact, "was edited or damaged: its checksum is wrong")


def test_an_unknown_format_version_names_who_wrote_it(artefact):
    content = content_of(artefact)
    seal(artefact, {**content, "format_version": 99})
    refused(artefact, rf"format version 99, .* reads 1 and 2; .*lit_clipq {lit_clipq.__version__}")


def test_a_recipe_of_another_version_is_refused(artefact):
    content = content_of(artefact)
    content["recipe"]["options"]["charm"] = 3
    seal(artefact, content)
    refused(artefact, "recipe of another version: the recipe has no option charm")


def test_missing_and_extra_tensors_are_named(artefact):
    tensors = load_file(artefact / TENSORS)
    name = "clip.visual.conv1.weight_quantizer.scale"
    save_file({key: value for key, value in tensors.items() if key != name}, artefact / TENSORS)
    seal(artefact, content_of(artefact))
    refused(artefact, f"no tensors of the name: {name}")
    save_file({**tensors, "clip.extra": torch.zeros(1)}, artefact / TENSORS)
    seal(artefact, content_of(artefact))
    refused(artefact, r"quantization\.json does not list: clip\.extra")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t[:-1], "tensor clip.visual.conv1.weight_codes is damaged: expected"),
        (lambda t: t.short(), "tensor clip.visual.conv1.weight_codes is damaged: expected"),
    ],
)
def test_codes_of_a_wrong_size_are_named(artefact, change, match):
    tensors = load_file(artefact / TENSORS)
    tensors["clip.visual.conv1.weight_codes"] = change(tensors["clip.visual.conv1.weight_codes"])
    save_file(tensors, artefact / TENSORS)
    seal(artefact, content_of(artefact))
    refused(artefact, match)


def test_tensors_and_table_that_agree_but_do_not_fit_the_network_are_named(artefact):
    tensors, content = load_file(artefact / TENSORS), content_of(artefact)
    name = "clip.visual.conv1.weight_quantizer.scale"
    del tensors[name], content["tensors"][name]
    save_file(tensors, artefact / TENSORS)
    seal(artefact, content)
    refused(artefact, r"no grid for layer clip\.visual\.conv1")


def test_a_network_of_another_shape_is_refused_and_its_layers_stay_float(artefact):
    artefact = read_artefact(artefact)
    other = lit_clipq.load_clip("mini-resnet")
    with pytest.raises(ModelError, match="layers that the network has not: clip"):
        artefact.load_into(other.model)
    assert not any(isinstance(module, QModule) for module in other.model.modules())


def test_another_model_or_other_weights_are_told_apart(shared, artefact):
    saved = read_artefact(artefact)

    def check(name, seed=0, **changes):
        torch.manual_seed(seed)
        run = identify(lit_clipq.load_clip(name))
        saved.identity.check_serves(type(run)(**{**vars(run), **changes}), artefact)

    check("mini-vit")
    check("mini-vit", seed=1, weights_hash="")
    with pytest.raises(ModelError, match="holds model 'mini-vit', but the run has 'mini-resnet'"):
        check("mini-resnet")
    with pytest.raises(ModelError, match=r"made from random weights of mini-vit, but .* the weights 'mini'"):
        check("mini-vit", seed=1, pretrained="mini")
    with pytest.raises(ModelError, match="another configuration, vocabulary or precision"):
        check("mini-vit", precision="bf16")


def test_nothing_is_unpickled():
    """The package names no unpickler."""
    sources = list(Path(lit_clipq.checkpoint.__file__).parent.glob("*.py"))
    assert sources
    for source in sources:
        assert "torch.load" not in source.read_text()
        assert "import pickle" not in source.read_text()


def test_group_grids_of_tables_survive(tmp_path):
    clip, facts = make(bits=4)
    table = lit_clipq.load_clip("mini-vit").model.token_embedding
    quantizer = UniformQuantizer(3, symmetric=True, granularity=PerGroup(32))
    quantizer.set_range(*extrema(table.weight.detach(), quantizer.granularity))
    clip.model.token_embedding = QEmbedding(table, quantizer)
    clip.model.token_embedding.freeze()
    lit_clipq.save_quantized(tmp_path / "artefact", clip.model, **facts)
    assert_same_outputs(lit_clipq.load_quantized(tmp_path / "artefact"), clip)
