"""Folders with a model in them, and what lies beside a weights file."""

import argparse
import json
import logging
import pickle

import huggingface_hub
import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from lit_clipq.errors import ConfigError, ModelError
from lit_clipq.models import PreprocessingOptions, load_clip
from lit_clipq.models.configs import resolve_config
from lit_clipq.models.snapshot import evidence_beside, weights_in
from lit_clipq.models.weights_file import read_weights_file
from tests.models.conftest import CONFIGS, build

MEAN = [0.1, 0.2, 0.3]


@pytest.fixture
def state():
    return build(CONFIGS["vit"]).state_dict()


@pytest.fixture
def folder(tmp_path, state):
    """A snapshot of open_clip's."""
    path = tmp_path / "snapshot"
    path.mkdir()
    content = {"model_cfg": CONFIGS["vit"], "preprocess_cfg": {"mean": MEAN, "std": [1, 1, 1]}}
    (path / "open_clip_config.json").write_text(json.dumps(content))
    save_file(state, path / "open_clip_model.safetensors")
    return path


def assert_loaded(loaded, state):
    found = loaded.model.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


def black(loaded):
    """What black becomes: minus the mean over the standard deviation."""
    return loaded.preprocessing.image(Image.new("RGB", (40, 40)))[:, 0, 0]


# Folders


@pytest.mark.parametrize("form", ["{}", "local-dir:{}"])
def test_a_folder_is_a_model_with_its_weights_and_preprocessing(folder, state, form):
    loaded = load_clip(form.format(folder))
    assert_loaded(loaded, state)
    torch.testing.assert_close(black(loaded), -torch.tensor(MEAN))
    assert loaded.pretrained == str(folder)


def test_weights_given_beside_a_folder_win(folder, state, tmp_path):
    other = {name: tensor + 1 for name, tensor in state.items()}
    torch.save(other, tmp_path / "other.pt")
    assert_loaded(load_clip(f"local-dir:{folder}", str(tmp_path / "other.pt")), other)


def test_a_folder_as_weights_brings_its_preprocessing(folder, state, config_file):
    loaded = load_clip(str(config_file()), str(folder))
    assert_loaded(loaded, state)
    torch.testing.assert_close(black(loaded), -torch.tensor(MEAN))


def test_a_file_in_a_snapshot_is_prepared_as_the_snapshot_says(folder, config_file):
    loaded = load_clip(str(config_file()), str(folder / "open_clip_model.safetensors"))
    torch.testing.assert_close(black(loaded), -torch.tensor(MEAN))


def test_the_only_weights_file_is_taken_and_several_are_refused(tmp_path):
    with pytest.raises(ModelError, match="holds none"):
        weights_in(tmp_path)
    (tmp_path / "mine.pt").touch()
    assert weights_in(tmp_path) == tmp_path / "mine.pt"
    (tmp_path / "other.ckpt").touch()
    with pytest.raises(ModelError, match=r"several: mine\.pt, other\.ckpt"):
        weights_in(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    (tmp_path / "open_clip_model.safetensors").touch()
    assert weights_in(tmp_path).name == "open_clip_model.safetensors"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"holds no open_clip_config\.json"),
        ({"config.json": "{}"}, r"one of transformers'.*--model\.pretrained"),
        ({"open_clip_config.json": "{"}, "not readable JSON"),
        ({"open_clip_config.json": "{}"}, "lacks embed_dim"),
    ],
)
def test_folders_that_are_no_model_say_what_is_missing(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ModelError, match=message):
        load_clip(f"local-dir:{tmp_path}")
    with pytest.raises(ModelError, match=r"absent does not exist"):
        load_clip(f"local-dir:{tmp_path}/absent")


def test_a_folder_in_the_way_does_not_hide_a_published_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ViT-B-32").mkdir()
    (tmp_path / "laion2b_s34b_b79k").mkdir()
    assert resolve_config("ViT-B-32").published == "ViT-B-32"


def test_tokenizer_of_a_folder_takes_the_place_of_the_hubs(folder):
    file = folder / "open_clip_config.json"
    content = json.loads(file.read_text())
    content["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "nobody/absent"
    file.write_text(json.dumps(content))
    assert resolve_config(str(folder)).model["text_cfg"]["hf_tokenizer_name"] == "nobody/absent"
    (folder / "tokenizer.json").write_text("{}")
    assert resolve_config(str(folder)).model["text_cfg"]["hf_tokenizer_name"] == str(folder)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_configuration_in_any_encoding_of_an_editor_is_read(tmp_path, encoding):
    path = tmp_path / "model.json"
    path.write_text(json.dumps(CONFIGS["vit"]), encoding=encoding)
    assert resolve_config(str(path)).model == CONFIGS["vit"]


# The hub


def hub_cache(root, repository, folder):
    """Lay a folder out as the hub's cache does: snapshots link to blobs."""
    base = root / f"models--{repository.replace('/', '--')}"
    commit = "0" * 40
    (base / "refs").mkdir(parents=True)
    (base / "refs" / "main").write_text(commit)
    (base / "blobs").mkdir()
    snapshot = base / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        blob = base / "blobs" / file.name.encode().hex()
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(blob)
    return snapshot


@pytest.fixture
def hub(tmp_path, monkeypatch):
    root = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root))

    def unreachable(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    return root


@pytest.mark.parametrize("revision", ["", "@main"])
def test_a_cached_repository_loads_without_network(hub, folder, state, revision):
    hub_cache(hub, "me/clip", folder)
    loaded = load_clip(f"hf-hub:me/clip{revision}")
    assert_loaded(loaded, state)
    torch.testing.assert_close(black(loaded), -torch.tensor(MEAN))


def test_a_repository_without_weights_names_them(hub, folder):
    (folder / "open_clip_model.safetensors").unlink()
    hub_cache(hub, "me/clip", folder)
    with pytest.raises(ModelError, match=r"missing open_clip_model\.safetensors.*hf download me/clip"):
        load_clip("hf-hub:me/clip")


def test_an_unreachable_repository_names_the_way_out(hub):
    with pytest.raises(ModelError, match=r"open_clip_config\.json.*hf download me/absent.*local-dir:FOLDER"):
        load_clip("hf-hub:me/absent")


def test_weights_in_the_hubs_cache_are_those_that_open_clip_lists(hub, folder):
    (folder / "open_clip_config.json").unlink()
    cfg = open_clip.get_pretrained_cfg("ViT-L-14", "laion2b_s32b_b82k")
    assert cfg["mean"] == (0.5, 0.5, 0.5)
    snapshot = hub_cache(hub, cfg["hf_hub"].rstrip("/"), folder)
    found = evidence_beside(snapshot / "open_clip_model.safetensors", "ViT-L-14")
    assert (found.preprocess["mean"], found.quick_gelu) == ((0.5, 0.5, 0.5), False)
    assert evidence_beside(snapshot / "open_clip_model.safetensors", None).quick_gelu is None
    openai = open_clip.get_pretrained_cfg("ViT-B-32", "openai")["hf_hub"].rstrip("/")
    path = hub_cache(hub, openai, folder) / "open_clip_model.safetensors"
    with pytest.raises(ModelError, match=r"trained with QuickGELU.*'ViT-B-32-quickgelu'"):
        load_clip("ViT-B-32", str(path))


# What decides the activation


@pytest.mark.parametrize(
    "place", ["laion_vs_openai/model.pt", "beats_openai.pt", "vit.openai/open_clip_model.safetensors", "a/openai.pt"]
)
@pytest.mark.parametrize("config", ["vit", "quickgelu"])
def test_a_path_says_nothing_about_the_activation(tmp_path, config_file, state, place, config):
    path = tmp_path / place
    path.parent.mkdir(exist_ok=True)
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    assert_loaded(load_clip(str(config_file(config)), str(path)), state)


def test_a_flag_decides_over_what_lies_beside_the_weights(folder, config_file, state, caplog):
    quick = str(config_file("quickgelu"))
    with pytest.raises(ModelError, match=r"trained with GELU, but model .* uses QuickGELU"):
        load_clip(quick, str(folder))
    with caplog.at_level(logging.WARNING):
        loaded = load_clip(str(config_file("vit")), str(folder), quick_gelu=True)
    assert_loaded(loaded, state)
    assert isinstance(loaded.model.visual.transformer.resblocks[0].mlp.gelu, open_clip.transformer.QuickGELU)
    assert "QuickGELU is used as --model.quick_gelu says" in caplog.text
    plain = load_clip(quick, quick_gelu=False).model
    assert isinstance(plain.visual.transformer.resblocks[0].mlp.gelu, torch.nn.GELU)


class QuickGELU(torch.nn.Module):
    def forward(self, x: torch.Tensor):
        return x * torch.sigmoid(1.702 * x)


class PlainGELU(torch.nn.Module):
    def forward(self, x: torch.Tensor):
        return torch.nn.functional.gelu(x)


@pytest.mark.parametrize(("kind", "expected"), [(QuickGELU, True), (PlainGELU, False), (torch.nn.ReLU, None)])
def test_a_torchscript_archive_says_its_activation(tmp_path, kind, expected):
    module = kind()
    module.register_buffer("scale", torch.ones(1))
    path = tmp_path / "archive.pt"
    torch.jit.save(torch.jit.script(module), path)
    assert read_weights_file(path).quick_gelu is expected


# What is assumed is told; what is said is done


@pytest.fixture
def narrow(monkeypatch):
    """A published name with a small architecture, so that local weights of it can be had."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-L-14", CONFIGS["vit"])
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-B-16-SigLIP", CONFIGS["vit"])


def test_a_file_that_says_nothing_is_told_of_where_published_weights_differ(tmp_path, state, narrow, caplog):
    path = tmp_path / "weights.pt"
    torch.save(state, path)
    with caplog.at_level(logging.WARNING):
        load_clip("ViT-L-14", str(path))
    for part in ("mean (0.48145466,", "std (0.26862954,", "interpolation bicubic", "resize_mode shortest",
                 "--model.mean, std, interpolation or resize_mode", "--model.quick_gelu"):  # fmt: skip
        assert part in caplog.text
    caplog.clear()
    options = PreprocessingOptions(mean=0.5, std=0.5)
    with caplog.at_level(logging.WARNING):
        load_clip("ViT-L-14", str(path), preprocessing=options, quick_gelu=False)
        load_clip("ViT-B-16-SigLIP", str(path))
    assert caplog.text == ""


def test_options_win_over_everything_and_change_the_fingerprint(folder):
    first = load_clip(str(folder))
    options = PreprocessingOptions(mean=0.5, std=[0.5, 0.25, 1.0], interpolation="bilinear", resize_mode="squash")
    second = load_clip(str(folder), preprocessing=options)
    torch.testing.assert_close(black(second), torch.tensor([-1.0, -2.0, -0.5]))
    assert first.preprocessing.fingerprint != second.preprocessing.fingerprint
    wide = Image.new("RGB", (64, 16), "black")
    wide.paste("white", (0, 0, 16, 16))  # cut away where the middle is taken, kept where the picture is squashed
    assert float(first.preprocessing.image(wide)[0].std()) < 0.1
    assert second.preprocessing.image(wide)[0, :, 0].min() > 0.5


@pytest.mark.parametrize(
    "options",
    [
        {"mean": [0.5, 0.5]},
        {"mean": float("nan")},
        {"std": 0},
        {"std": [1, 1, -1]},
        {"interpolation": "nearest"},
        {"resize_mode": "crop"},
    ],
)
def test_options_that_prepare_no_picture_are_refused(options):
    with pytest.raises(ConfigError, match=f"--model.{next(iter(options))} must be"):
        PreprocessingOptions(**options)


def test_transformers_preprocessing_beside_the_weights_is_used(tmp_path, config_file, state):
    save_file(state, tmp_path / "model.safetensors")
    content = {"image_mean": MEAN, "image_std": [0.5, 0.5, 0.5], "resample": 2, "size": {"height": 32, "width": 32}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    found = evidence_beside(tmp_path / "model.safetensors", None).preprocess
    expected = {"mean": tuple(MEAN), "std": (0.5,) * 3, "interpolation": "bilinear", "resize_mode": "squash"}
    assert found == expected
    torch.testing.assert_close(black(load_clip(str(config_file()), str(tmp_path))), -2 * torch.tensor(MEAN))


# Files by their content


@pytest.mark.parametrize("name", ["weights.bin", "0123456789abcdef", "weights.pt"])
def test_safetensors_of_any_name_are_read(tmp_path, config_file, state, name):
    save_file(state, tmp_path / name)
    assert_loaded(load_clip(str(config_file()), str(tmp_path / name)), state)


def test_a_state_dict_called_safetensors_is_read(tmp_path, config_file, state):
    torch.save(state, tmp_path / "weights.safetensors")
    assert_loaded(load_clip(str(config_file()), str(tmp_path / "weights.safetensors")), state)


@pytest.mark.parametrize("kind", ["model-0000{}-of-00002.safetensors", "pytorch_model-0000{}-of-00002.bin"])
def test_a_file_in_parts_is_read_by_its_index(tmp_path, config_file, state, kind):
    names = list(state)
    halves = {kind.format(1): names[::2], kind.format(2): names[1::2]}
    for part, chosen in halves.items():
        content = {name: state[name] for name in chosen}
        save_file(content, tmp_path / part) if part.endswith("safetensors") else torch.save(content, tmp_path / part)
    places = {name: part for part, chosen in halves.items() for name in chosen}
    base = "model.safetensors" if kind.endswith("safetensors") else "pytorch_model.bin"
    index = tmp_path / f"{base}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert_loaded(load_clip(str(config_file()), str(tmp_path)), state)
    index.write_text(json.dumps({"weight_map": {**places, "more": kind.format(1)}}))
    with pytest.raises(ModelError, match="lists 'more'"):
        load_clip(str(config_file()), str(index))
    index.write_text(json.dumps({"weight_map": {**places, "more": "../other.bin"}}))
    with pytest.raises(ModelError, match=r"'\.\./other\.bin', which leaves"):
        load_clip(str(config_file()), str(index))
    index.write_text("[]")
    with pytest.raises(ModelError, match="is no index"):
        load_clip(str(config_file()), str(index))
    index.write_text(json.dumps({"weight_map": places}))
    (tmp_path / kind.format(2)).unlink()
    with pytest.raises(ModelError, match=r"00002-of-00002\.\w+ does not exist"):
        load_clip(str(config_file()), str(tmp_path))


def test_other_kinds_of_files_are_called_what_they_are(tmp_path, config_file):
    np.savez(tmp_path / "siglip.npz", weight=np.zeros(3))
    with pytest.raises(ModelError, match="holds NumPy arrays, as big_vision"):
        load_clip(str(config_file()), str(tmp_path / "siglip.npz"))
    pointer = tmp_path / "model.safetensors"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ModelError, match="is a pointer of Git LFS; fetch"):
        load_clip(str(config_file()), str(pointer))


# Training checkpoints


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    ("beside", "name"),
    [
        (np.float64(0.5), "numpy._core.multiarray.scalar"),
        (argparse.Namespace(lr=1.0), "argparse.Namespace"),
        (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
    ],
)
def test_objects_beside_the_weights_are_named_and_not_restored(tmp_path, config_file, state, beside, name, legacy):
    path = tmp_path / "train.pt"
    torch.save({"best": beside, "state_dict": state}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ModelError) as caught:
        load_clip(str(config_file()), str(path))
    for part in (name, "no tensors", "torch.save(c['state_dict']", "trust"):
        assert part in str(caught.value)
    assert "damaged" not in str(caught.value)
    converted = tmp_path / "weights.pt"
    c = torch.load(path, weights_only=False)  # as the message says
    torch.save(c["state_dict"], converted)
    assert_loaded(load_clip(str(config_file()), str(converted)), state)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
def test_a_plain_pickle_is_called_one(tmp_path, config_file):
    path = tmp_path / "weights.pt"
    path.write_bytes(pickle.dumps({"visual.a": np.zeros(3)}))
    with pytest.raises(ModelError, match="is a plain pickle"):
        load_clip(str(config_file()), str(path))


@pytest.mark.parametrize("content", [{"epoch": 3, "lr": 0.1}, {"state_dict": {"a": 1}}, [torch.ones(1)], {}])
def test_a_file_without_weights_says_what_it_holds(tmp_path, config_file, content):
    path = tmp_path / "weights.pt"
    torch.save(content, path)
    with pytest.raises(ModelError, match=r"holds no state dict, but (the keys '(epoch' \(int\)|state_dict)|an )"):
        load_clip(str(config_file()), str(path))
