"""The runtime: the same input as open_clip prepares, no torch, and folders that are checked."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lit_clipq import load_clip
from lit_clipq.errors import ConfigError, DataError, ModelError
from lit_clipq.export.inputs import image_transform, write_tokenizer
from lit_clipq.mini.world import picture, picture_captions
from lit_clipq.models import PreprocessingOptions
from lit_clipq.runtime import Index, load
from lit_clipq.runtime.folder import (
    CONTENT_FILE,
    PREPROCESS_FILE,
    TOKENIZER_FILE,
    TOWER_FILES,
    content_hash,
    file_hash,
)
from lit_clipq.runtime.packages import need
from lit_clipq.runtime.session import open_session
from lit_clipq.runtime.tokenizer import Tokenizer
from tests.export.conftest import Exported, twin  # noqa: F401 - a fixture

TEXTS = [
    "a red circle",
    "",
    "  Hello,   World!! it's 1234 & we're fine\tand\nwell",
    "naïve café 日本語 😀 don't İstanbul ǅ x²½ ①",
    "a literal <end_of_text> and !!<start_of_text>abc",
    "&amp;lt;b&gt; ﬁne — “quotes” a_b__c it'S 'LL",
    "word " * 200,
]
SIZES = [(64, 64), (100, 64), (37, 91), (640, 480), (481, 641), (5, 300), (33, 33)]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mini-vit", {}),
        ("ViT-B-32", {}),
        ("mini-vit", {"resize_mode": "longest", "interpolation": "bilinear", "mean": 0.5, "std": 0.25}),
        ("mini-vit", {"resize_mode": "squash"}),
    ],
)
def test_pictures_are_prepared_bit_for_bit_as_by_open_clip(name, options):
    with_weights = "mini" if name.startswith("mini") else None
    loaded = load_clip(name, with_weights, preprocessing=PreprocessingOptions(**options))
    transform, rng = image_transform(loaded), np.random.default_rng(0)
    for width, height in SIZES:
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        assert np.array_equal(transform(image), loaded.preprocessing.image(image).numpy())


@pytest.mark.parametrize("name", ["mini-vit", "ViT-B-32"])
def test_token_ids_are_those_of_open_clip(name, tmp_path):
    loaded = load_clip(name, "mini" if name.startswith("mini") else None)
    told = write_tokenizer(loaded, tmp_path / "tokenizer.json")
    tokenizer = Tokenizer(tmp_path / "tokenizer.json", told["context_length"], told["special"], told["clean"])
    texts = [*TEXTS, *(text for index in range(100) for text in picture_captions("validation", index))]
    assert np.array_equal(tokenizer(texts), loaded.preprocessing.tokenizer(texts).numpy())
    with pytest.raises(DataError, match="expected a list of texts"):
        tokenizer("one text")


def test_an_export_runs_where_torch_cannot_be_imported(twin: Exported, tmp_path):  # noqa: F811
    Image.fromarray(picture("validation", 0)).save(tmp_path / "scene.png")
    code = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchvision", "lightning", "open_clip", "onnx", "transformers"):
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocked())
from lit_clipq.runtime import Index, load
model = load({str(twin.report.path)!r})
index = Index.build(model, {str(tmp_path)!r})
hits = index.search(model, "a circle")
scores = model.classify([hits[0].path], ["circle", "square"])
print(hits[0].path.name, scores.shape, abs(float(scores.sum()) - 1) < 1e-5, "torch" in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.split() == ["scene.png", "(1,", "2)", "True", "False"], result.stderr


def test_search_ranks_by_cosine_and_an_index_comes_back_from_its_file(twin: Exported, tmp_path):  # noqa: F811
    model, folder = load(twin.report.path), tmp_path / "pictures"
    folder.mkdir()
    for i in range(6):
        Image.fromarray(picture("validation", i)).save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes(b"no picture")
    index = Index.build(model, folder)
    assert index.names == tuple(f"{i}.png" for i in range(6))
    assert len(index.unread) == 1
    text = picture_captions("validation", 3)[0]
    hits = index.search(model, text, count=3)
    scores = model.embed_images([folder / name for name in index.names]) @ model.embed_texts([text])[0]
    assert [hit.path.name for hit in hits] == [f"{i}.png" for i in np.argsort(-scores)[:3]]
    index.save(tmp_path / "index.npz")
    again = Index.read(tmp_path / "index.npz")
    assert again.search(model, text, count=3) == hits
    with pytest.raises(DataError, match="is no index of pictures"):
        Index.read(folder / "broken.png")


def test_an_edited_or_cut_export_is_refused(twin: Exported, tmp_path):  # noqa: F811
    def copy(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for file in twin.report.path.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        return folder

    cut = copy("cut")
    (cut / "image.onnx").write_bytes((cut / "image.onnx").read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"image\.onnx was cut short or edited"):
        load(cut)
    (cut / "image.onnx").unlink()
    with pytest.raises(ModelError, match="incomplete"):
        load(cut)
    edited = copy("edited")
    content = json.loads((edited / "export.json").read_text())
    (edited / "export.json").write_text(json.dumps({**content, "logit_scale": 0.0}))
    with pytest.raises(ModelError, match="its checksum is wrong"):
        load(edited)
    (edited / "export.json").write_text(json.dumps({**content, "format_version": 99}))
    with pytest.raises(ModelError, match="format version 99"):
        load(edited)
    with pytest.raises(ModelError, match="expected an export in"):
        load(tmp_path)


def test_a_missing_package_is_named_with_its_pip_line():
    with pytest.raises(Exception, match=r"run `pip install nothing-such`, or `pip install lit-clipq\[runtime\]`"):
        need("nothing_such", "nothing-such")


@pytest.mark.parametrize(("vnni", "entry"), [(True, "0"), (False, "1")])
def test_sessions_are_precise_where_the_cpu_would_saturate(twin: Exported, monkeypatch, vnni, entry):  # noqa: F811
    monkeypatch.setattr("lit_clipq.runtime.session.multiplies_exactly", lambda: vnni)
    options = open_session(twin.report.path / "text.onnx").get_session_options()
    assert options.get_session_config_entry("session.x64quantprecision") == entry


@pytest.mark.parametrize(
    "changes",
    [
        {"files": None},
        {"files": {}},
        {"files": {"../export.json": "0"}},
        {"towers": []},
        {"tokenizer": {}},
        {"tokenizer": {"reason": None, "context_length": "77", "special": ["a", "b"], "clean": "lower"}},
        {"tokenizer": {"reason": None, "context_length": 77, "special": [], "clean": "lower"}},
        {"logit_scale": float("nan")},
        {"model": None},
    ],
)
def test_values_of_another_type_are_refused_although_their_checksum_is_right(changes, twin, tmp_path):  # noqa: F811
    folder = tmp_path / "export"
    shutil.copytree(twin.report.path, folder)
    content = json.loads((folder / CONTENT_FILE).read_text()) | changes
    del content["checksum"]
    (folder / CONTENT_FILE).write_text(json.dumps({**content, "checksum": content_hash(content)}))
    with pytest.raises(ModelError, match="export the model again"):
        load(folder)


@pytest.mark.parametrize("name", [PREPROCESS_FILE, TOKENIZER_FILE, *TOWER_FILES.values()])
@pytest.mark.parametrize("new", [b"", b"[1]", b"[" * 100_000])
def test_files_that_are_none_are_refused_although_their_checksum_is_right(name, new, twin, tmp_path):  # noqa: F811
    folder = tmp_path / "export"
    shutil.copytree(twin.report.path, folder)
    (folder / name).write_bytes(new)
    content = json.loads((folder / CONTENT_FILE).read_text())
    del content["checksum"]
    content["files"][name] = file_hash(folder / name)
    (folder / CONTENT_FILE).write_text(json.dumps({**content, "checksum": content_hash(content)}))
    with pytest.raises(ModelError, match="export the model again"):
        load(folder)


def test_json_that_is_nested_without_end_is_refused(tmp_path):
    (tmp_path / CONTENT_FILE).write_text("[" * 100_000)
    with pytest.raises(ModelError, match="is damaged"):
        load(tmp_path)


def test_threads_below_one_are_refused(twin):  # noqa: F811
    with pytest.raises(ConfigError, match="threads must be at least 1, got 0"):
        load(twin.report.path, threads=0)
