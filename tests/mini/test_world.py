"""The world on disk: layout, frozen content, safe writing."""

import hashlib
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from lit_clipq.errors import ConfigError, DataError
from lit_clipq.mini import CLASS_NAMES, PRESETS, WORLD_HASHES, ensure_world, world_folder
from lit_clipq.mini import world as module
from lit_clipq.mini.world import Preset, picture, picture_captions, write_world

TINY = Preset({"val": 6, "calibration": 4}, {"val": 6, "calibration": 4}, {"val": 1, "calibration": 1})


@pytest.fixture(scope="module")
def small() -> Path:
    return ensure_world(None, "small")


@pytest.fixture
def tiny(monkeypatch, tmp_path) -> Path:
    """Make a preset of a few pictures; returns an empty root."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    monkeypatch.setitem(WORLD_HASHES, "tiny", write_world(scratch, "tiny"))
    return tmp_path / "root"


def test_small_world_is_the_recorded_one(small):
    manifest = json.loads((small / "manifest.json").read_text())
    assert manifest["hash"] == WORLD_HASHES["small"]
    assert manifest["hash"].startswith("01855d7e2ee1")


def test_hash_is_that_of_decoded_pixels_and_annotation_files(tiny):
    folder = ensure_world(tiny, "tiny")

    def pixels(path):
        return hashlib.sha256(np.asarray(Image.open(path)).tobytes()).hexdigest()

    digests = [pixels(p) for s in ("val", "calibration") for p in sorted((folder / "images").glob(f"{s}_*.png"))]
    for split in ("val", "calibration"):
        digests += [pixels(folder / "classification" / split / n / f"{n}_0000.png") for n in CLASS_NAMES]
    names = [f"annotations/captions_{s}.json" for s in ("val", "calibration")]
    for s in ("val", "calibration"):
        names += [f"vqa/v2_OpenEnded_mini_{s}_questions.json", f"vqa/v2_mini_{s}_annotations.json"]
    names += [f"classification/{s}/classes.json" for s in ("val", "calibration")]
    digests += [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names]
    assert hashlib.sha256("\n".join(digests).encode()).hexdigest() == WORLD_HASHES["tiny"]


def test_pictures_of_other_presets_are_frozen_too():
    sample = [("train", 0), ("train", 20_000), ("train", 32_767), ("dev", 499), ("val", 2_499), ("calibration", 511)]
    digest = hashlib.sha256()
    for split, index in sample:
        digest.update(picture(split, index).tobytes())
        digest.update("\n".join(picture_captions(split, index)).encode())
    assert digest.hexdigest()[:16] == "baf73c1418e29b9b"


def test_captions_are_in_coco_format_and_splits_are_disjoint(small):
    seen: set[str] = set()
    for split, count in PRESETS["small"].captioned.items():
        coco = COCO(str(small / "annotations" / f"captions_{split}.json"))
        assert len(coco.imgs) == count
        assert len(coco.anns) == 5 * count == len({a["id"] for a in coco.anns.values()})
        for image_id, entry in coco.imgs.items():
            assert len(coco.imgToAnns[image_id]) == 5
            assert (small / "images" / entry["file_name"]).is_file()
        digests = {
            hashlib.sha256((small / "images" / e["file_name"]).read_bytes()).hexdigest() for e in coco.imgs.values()
        }
        assert len(digests) == count
        assert not digests & seen
        seen |= digests


def test_questions_are_in_the_layout_of_vqa_v2(small):
    asked = json.loads((small / "vqa" / "v2_OpenEnded_mini_val_questions.json").read_text())
    answered = json.loads((small / "vqa" / "v2_mini_val_annotations.json").read_text())
    assert {"info", "task_type", "data_type", "license", "data_subtype", "questions"} <= asked.keys()
    assert len(asked["questions"]) == 1500
    by_id = {a["question_id"]: a for a in answered["annotations"]}
    assert len(by_id) == len(answered["annotations"]) == 1500
    for question in asked["questions"]:
        annotation = by_id[question["question_id"]]
        assert annotation["image_id"] == question["image_id"]
        assert [a["answer_id"] for a in annotation["answers"]] == list(range(1, 11))
        votes = [a["answer"] for a in annotation["answers"]]
        assert votes.count(annotation["multiple_choice_answer"]) == max(map(votes.count, votes))


def test_classification_has_a_folder_per_class(small):
    for split, count in PRESETS["small"].per_class.items():
        folder = small / "classification" / split
        assert list(json.loads((folder / "classes.json").read_text())) == list(CLASS_NAMES)
        assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == list(CLASS_NAMES)
        assert all(len(list((folder / name).glob("*.png"))) == count for name in CLASS_NAMES)


def test_two_who_ask_at_once_get_one_world(tiny):
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(lambda _: ensure_world(tiny, "tiny"), range(2)))
    assert folders[0] == folders[1]
    assert sorted(p.name for p in tiny.iterdir()) == [".tiny.lock", "tiny"]


def test_several_workers_write_the_same_world(tiny, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 2)
    monkeypatch.setattr(module, "get_context", lambda _: __import__("multiprocessing").get_context("fork"))
    ensure_world(tiny, "tiny", workers=2)


def test_nothing_is_left_of_a_world_that_could_not_be_finished(tiny, monkeypatch):
    monkeypatch.setattr(module, "_write_json", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(DataError, match=r"cannot be written to .*disk full"):
        ensure_world(tiny, "tiny")
    assert [p.name for p in tiny.iterdir()] == [".tiny.lock"]


def test_other_pixels_than_recorded_are_refused(tiny, monkeypatch):
    monkeypatch.setitem(WORLD_HASHES, "tiny", "0" * 64)
    with pytest.raises(DataError, match="this machine made"):
        ensure_world(tiny, "tiny")
    assert not (tiny / "tiny").exists()


@pytest.mark.parametrize("damage", ["manifest", "hash", "picture"])
def test_a_damaged_world_is_named(tiny, damage):
    folder = ensure_world(tiny, "tiny")
    if damage == "manifest":
        (folder / "manifest.json").write_text("{")
    elif damage == "hash":
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps({**manifest, "hash": "1" * 64}))
    else:
        next((folder / "images").glob("*.png")).unlink()
    with pytest.raises(DataError, match="delete the folder"):
        ensure_world(tiny, "tiny")
    shutil.rmtree(folder)
    ensure_world(tiny, "tiny")


def test_unknown_presets_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="small, full, train"):
        world_folder(tmp_path, "huge")


def test_what_a_killed_process_left_is_removed(tiny):
    (tiny / ".tiny-killed" / "images").mkdir(parents=True)
    (tiny / ".other-killed").mkdir()
    ensure_world(tiny, "tiny")
    assert sorted(p.name for p in tiny.iterdir()) == [".other-killed", ".tiny.lock", "tiny"]


def test_a_written_world_needs_no_lock(tiny):
    ensure_world(tiny, "tiny")
    (tiny / ".tiny.lock").unlink()
    ensure_world(tiny, "tiny")
    assert [p.name for p in tiny.iterdir()] == ["tiny"]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file/small.*LIT_CLIPQ_CACHE"):
        ensure_world(tmp_path / "file", "small")
