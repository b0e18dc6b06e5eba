import json
import logging
import time

import pytest
import torch

from datamodules import CocoRetrieval
from lit_clipq.errors import ConfigError, DataError


def ready(preprocessing, *args, **kwargs) -> CocoRetrieval:
    data = CocoRetrieval(*args, **kwargs)
    data.preprocessing = preprocessing
    data.prepare_data()
    data.setup("validate")
    return data


def epoch(data):
    """All of both loaders: pictures, ids, tokens, text ids, pairs."""
    images, texts = data.val_dataloader()
    images, texts = list(images), list(texts)
    return {
        **{key: torch.cat([batch[key] for batch in images]) for key in ("images", "image_ids")},
        **{key: torch.cat([batch[key] for batch in texts]) for key in ("texts", "text_ids", "pairs")},
        "batches": texts,
    }


def expected_rows(root, split, first):
    """(file name, caption) by a plain reading of the file."""
    content = json.loads((root / f"annotations/captions_{split}.json").read_text())
    names = {image["id"]: image["file_name"] for image in content["images"]}
    rows = {}
    for row in content["annotations"]:
        rows.setdefault(names[row["image_id"]], []).append(row["caption"].strip())
    return sorted((name, caption) for name, captions in rows.items() for caption in captions[:first])


def test_the_loaders_hold_every_caption_of_the_preset_once(coco, preprocessing):
    root = coco(val=20, train=3)
    data = ready(preprocessing, root, preset="val2017", batch_size=7)
    seen = epoch(data)
    vocabulary = {tuple(preprocessing.tokenizer([c])[0].tolist()): c for _, c in expected_rows(root, "val2017", 5)}
    texts = {int(i): vocabulary[tuple(t.tolist())] for i, t in zip(seen["text_ids"], seen["texts"], strict=True)}
    rows = [(data.pictures[image].path.name, texts[text]) for text, image in seen["pairs"].tolist()]
    assert sorted(rows) == expected_rows(root, "val2017", 5)
    assert seen["image_ids"].tolist() == list(range(20))
    assert seen["images"].dtype == torch.float32
    assert seen["images"].shape == (20, 3, 8, 8)
    assert all(seen[key].dtype == torch.int64 for key in ("image_ids", "texts", "text_ids", "pairs"))


def test_texts_are_distinct_sorted_by_length_and_their_pairs_are_in_their_batch(coco, preprocessing):
    root = coco(val=20, train=3)
    data = ready(preprocessing, root, preset="val2017", batch_size=7, captions_per_image=None)
    seen = epoch(data)
    assert len(torch.unique(seen["texts"], dim=0)) == len(seen["texts"])
    assert seen["text_ids"].tolist() == list(range(len(seen["texts"])))
    lengths = (seen["texts"] != 0).sum(1)
    assert (lengths.diff() >= 0).all()
    for batch in seen["batches"]:
        assert set(batch["pairs"][:, 0].tolist()) == set(batch["text_ids"].tolist())
    shared = preprocessing.tokenizer(["shared text"])[0]
    (text_id,) = [i for i, t in enumerate(seen["texts"]) if torch.equal(t, shared)]
    assert sorted(seen["pairs"][seen["pairs"][:, 0] == text_id][:, 1].tolist()) == [0, 1]
    assert data.sample_counts()["captions"] == 20 * 6 + 2
    assert data.sample_counts()["distinct_captions"] == 20 * 6 + 1


@pytest.mark.parametrize(("value", "captions"), [("preset", 5), (2, 2), (None, 6)])
def test_captions_per_image_overrides_the_preset(coco, preprocessing, value, captions):
    data = ready(preprocessing, coco(val=5, train=1), preset="val2017", captions_per_image=value)
    assert [len(picture.captions) for picture in data.pictures][2:] == [captions] * 3


def test_workers_load_the_same_batches(coco, preprocessing):
    root = coco(val=9, train=1)
    one = epoch(ready(preprocessing, root, preset="val2017", batch_size=4))
    two = epoch(ready(preprocessing, root, preset="val2017", batch_size=4, num_workers=2))
    assert torch.equal(one["images"], two["images"])
    assert torch.equal(one["pairs"], two["pairs"])


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_evaluation_and_the_calibration_set(coco, preprocessing, monkeypatch, world_size):
    data = ready(preprocessing, coco(val=11, train=7), preset="val2017", batch_size=4)
    whole = epoch(data)
    whole_calibration = torch.cat([texts for _, texts in data.calibration_dataloader(6, 4, 3)])
    ids, pairs, calibration = [], [], {}
    for rank in range(world_size):
        monkeypatch.setattr("datamodules.sampler.shard", lambda rank=rank: (rank, world_size))
        part = epoch(data)
        ids += part["image_ids"].tolist()
        pairs += part["pairs"].tolist()
        texts = torch.cat([texts for _, texts in data.calibration_dataloader(6, 4, 3)])
        calibration.update({rank + world_size * i: row for i, row in enumerate(texts)})
    assert sorted(ids) == whole["image_ids"].tolist()
    assert sorted(pairs) == sorted(whole["pairs"].tolist())
    assert torch.equal(torch.stack([calibration[i] for i in range(6)]), whole_calibration)


def test_a_missing_picture_is_named_or_skipped_with_its_captions(coco, preprocessing, caplog):
    root = coco(val=6, train=1)
    (root / "val2017/val2017_002.jpg").unlink()
    broken = root / "val2017/val2017_004.jpg"
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(DataError, match=r"val2017_002\.jpg is missing"):
        ready(preprocessing, root, preset="val2017")
    with caplog.at_level(logging.WARNING):
        data = ready(preprocessing, root, preset="val2017", on_error="skip")
    assert "2 missing or damaged pictures were skipped" in caplog.text
    counts = data.sample_counts()
    assert (counts["images"], counts["skipped"], counts["captions"]) == (4, 2, 20)
    kept = {f"val2017_{i:03}.jpg" for i in (0, 1, 3, 5)}
    rows = [row for row in expected_rows(root, "val2017", 5) if row[0] in kept]
    assert sorted((p.path.name, c) for p in data.pictures for c in p.captions) == rows
    assert sorted(epoch(data)["pairs"][:, 1].unique().tolist()) == [0, 1, 2, 3]


def test_a_picture_that_breaks_after_the_check_is_named(coco, preprocessing):
    root = coco(val=4, train=1)
    data = ready(preprocessing, root, preset="val2017")
    (root / "val2017/val2017_003.jpg").write_bytes(b"x")
    with pytest.raises(DataError, match=r"val2017_003\.jpg cannot be decoded"):
        epoch(data)


def test_karpathy_test_takes_all_captions_and_calibrates_on_restval(karpathy, preprocessing):
    data = ready(preprocessing, karpathy)
    counts = data.sample_counts()
    assert (counts["images"], counts["captions"], counts["calibration_held_out"]) == (6, 32, 0)
    images, texts = next(iter(data.calibration_dataloader(10, 8, 0)))
    restval = [f"restval picture {i} caption {k}" for i in range(6, 10) for k in range(5)]
    known = {tuple(row.tolist()) for row in preprocessing.tokenizer(restval)}
    assert images.shape[0] == texts.shape[0] == 4  # the train pictures are not on disk
    assert {tuple(row.tolist()) for row in texts} <= known


def keep_splits(karpathy, *splits):
    file = karpathy / "dataset_coco.json"
    rows = [row for row in json.loads(file.read_text())["images"] if row["split"] in splits]
    file.write_text(json.dumps({"images": rows}))


def test_karpathy_without_train_rows_holds_a_slice_out(karpathy, preprocessing):
    keep_splits(karpathy, "test")
    counts = ready(preprocessing, karpathy, held_out_calibration=2).sample_counts()
    assert (counts["images"], counts["calibration_held_out"]) == (4, 2)


def test_karpathy_without_test_rows_is_an_error(karpathy, preprocessing):
    keep_splits(karpathy, "train", "restval")
    with pytest.raises(DataError, match="no picture of its evaluation split"):
        ready(preprocessing, karpathy)


def test_karpathy_file_may_lie_with_the_annotations(karpathy, preprocessing):
    (karpathy / "annotations").mkdir()
    (karpathy / "dataset_coco.json").rename(karpathy / "annotations/dataset_coco.json")
    assert ready(preprocessing, karpathy).sample_counts()["images"] == 6


@pytest.mark.parametrize(
    ("preset", "names"),
    [
        ("karpathy_test", ["dataset_coco.json", "val2014/", "caption_datasets.zip", "val2014.zip"]),
        ("val2017", ["annotations/captions_val2017.json", "val2017/", "annotations_trainval2017.zip", "val2017.zip"]),
    ],
)
def test_absent_data_says_what_is_expected_where(tmp_path, preset, names):
    with pytest.raises(DataError) as caught:
        CocoRetrieval(str(tmp_path / "nowhere"), preset=preset).prepare_data()
    assert all(name in str(caught.value) for name in [*names, str(tmp_path / "nowhere"), "--data.download true"])


@pytest.mark.parametrize(
    "options",
    [
        {"preset": "val2018"},
        {"captions_per_image": 0},
        {"batch_size": 0},
        {"num_workers": -1},
        {"limit": 0},
        {"on_error": "ignore"},
        {"held_out_calibration": 0},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_out_of_range_are_refused_by_name(options):
    with pytest.raises(ConfigError, match=f"--data.{next(iter(options))} .*got"):
        CocoRetrieval("data", **options)


def test_setup_without_preprocessing_says_so(coco):
    with pytest.raises(ConfigError, match="preprocessing"):
        CocoRetrieval(coco(val=3, train=1), preset="val2017").setup()


def test_the_fingerprint_follows_the_data_and_not_the_loading(coco, preprocessing):
    root = coco(val=6, train=2)
    first = ready(preprocessing, root, preset="val2017").fingerprint()
    assert ready(preprocessing, root, preset="val2017", batch_size=3, num_workers=2).fingerprint() == first
    changed = {
        "limit": ready(preprocessing, root, preset="val2017", limit=4),
        "captions": ready(preprocessing, root, preset="val2017", captions_per_image=3),
        "on_error": ready(preprocessing, root, preset="val2017", on_error="skip"),
        "preprocessing": ready(type(preprocessing)("other"), root, preset="val2017"),
    }
    prints = {name: data.fingerprint() for name, data in changed.items()}
    (root / "val2017/val2017_001.jpg").write_bytes((root / "val2017/val2017_000.jpg").read_bytes())
    prints["content"] = ready(preprocessing, root, preset="val2017").fingerprint()
    assert len({first, *prints.values()}) == 1 + len(prints)


def test_the_real_val2017_is_evaluated_where_pictures_exist(real_data, preprocessing):
    start = time.perf_counter()
    data = ready(preprocessing, str(real_data / "coco"), preset="val2017", on_error="skip")
    seconds = time.perf_counter() - start
    counts = data.sample_counts()
    there = {path.name for path in (real_data / "coco/val2017").iterdir()}
    rows = [row for row in expected_rows(real_data / "coco", "val2017", 5) if row[0] in there]
    assert (counts["images"], counts["skipped"]) == (len(there), 5000 - len(there))
    assert sorted((p.path.name, c) for p in data.pictures for c in p.captions) == rows
    assert counts["calibration_held_out"] == 0
    images, texts = next(iter(data.calibration_dataloader(16, 16, 0)))
    assert (len(images), len(texts)) == (16, 16)
    assert seconds < 20
