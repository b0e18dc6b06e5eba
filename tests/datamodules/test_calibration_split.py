import logging
import shutil

import pytest
import torch

from datamodules import CocoRetrieval
from datamodules.calibration_split import choose_pictures, hold_out, permutation
from datamodules.images import Picture
from lit_clipq.errors import CalibrationError, ConfigError, DataError
from lit_clipq.pictures import load_rgb


def ready(preprocessing, root, **kwargs) -> CocoRetrieval:
    data = CocoRetrieval(root, preset="val2017", **kwargs)
    data.preprocessing = preprocessing
    data.setup("validate")
    return data


def batches(data, samples, seed=0):
    return list(data.calibration_dataloader(samples, 4, seed))


def test_train_pictures_calibrate_with_their_own_captions(coco, preprocessing):
    data = ready(preprocessing, coco(val=4, train=8))
    images, texts = zip(*batches(data, 6), strict=True)
    assert [len(part) for part in images] == [len(part) for part in texts] == [4, 2]
    for image, text in zip(torch.cat(images), torch.cat(texts), strict=True):
        own = [
            captions
            for picture, captions in ((p, p.captions) for p in data._pool)
            if torch.equal(preprocessing.image(load_rgb(picture.path)), image)
        ]
        assert len(own) == 1
        assert any(torch.equal(preprocessing.tokenizer([caption])[0], text) for caption in own[0])


def test_the_draw_depends_on_the_seed_only(coco, preprocessing):
    root = coco(val=4, train=12)
    first = batches(ready(preprocessing, root), 6)
    again = batches(ready(preprocessing, root, batch_size=3, num_workers=1), 6)
    other = batches(ready(preprocessing, root), 6, seed=1)
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a[0], b[0]) for a, b in zip(first, other, strict=True))


def test_without_other_pictures_a_slice_leaves_the_evaluation(coco, preprocessing):
    root = coco(val=30)
    data = ready(preprocessing, root)
    evaluated = {picture.path for picture in data.pictures}
    assert data.sample_counts()["images"] == 27
    assert data.sample_counts()["calibration_held_out"] == 3
    assert not evaluated & {picture.path for picture in data._pool}
    for samples in (1, 2, 3):
        again = ready(preprocessing, root)
        assert sum(len(images) for images, _ in batches(again, samples, seed=samples)) == samples
        assert {picture.path for picture in again.pictures} == evaluated
    assert ready(preprocessing, root, held_out_calibration=10).sample_counts()["images"] == 20


@pytest.mark.parametrize(
    ("pictures", "count", "size"), [(10, None, 1), (1000, None, 100), (10_000, None, 128), (9, 8, 8)]
)
def test_size_of_the_slice(pictures, count, size):
    listed = list(range(pictures))
    evaluation, slice_ = hold_out(listed, count)
    assert len(slice_) == size
    assert sorted(evaluation + slice_) == listed


@pytest.mark.parametrize(("pictures", "count"), [(9, None), (5, 5), (5, 6)])
def test_a_slice_that_leaves_nothing_is_an_error(pictures, count):
    with pytest.raises(DataError, match="held_out_calibration"):
        hold_out(list(range(pictures)), count)


def test_fewer_pictures_than_asked_for_is_said(coco, preprocessing, caplog):
    data = ready(preprocessing, coco(val=4, train=3))
    with caplog.at_level(logging.WARNING):
        assert sum(len(images) for images, _ in batches(data, 100)) == 3
    assert "100 calibration samples were asked for, 3 pictures are there" in caplog.text


@pytest.mark.parametrize("how", ["same", "copy", "link"])
def test_a_calibration_root_that_overlaps_is_an_error(coco, preprocessing, tmp_path, how):
    root = coco(val=4, train=3)
    other = tmp_path / "other"
    if how == "same":
        other = root / "val2017"
    else:
        other.mkdir()
        evaluated = root / "val2017/val2017_002.jpg"
        shutil.copy(evaluated, other / "x.jpg") if how == "copy" else (other / "x.jpg").symlink_to(evaluated)
    data = ready(preprocessing, root, calibration_root=str(other))
    with pytest.raises(DataError, match="also evaluated"):
        data.calibration_dataloader(4, 4, 0)


def test_a_calibration_root_with_captions_gives_pairs(coco, preprocessing, tmp_path, draw):
    folder = tmp_path / "flickr"
    draw(folder / "images" / "a.jpg", 900)
    draw(folder / "images" / "b.jpg", 901)
    (folder / "captions.txt").write_text("image,caption\na.jpg,one\nb.jpg,two\n")
    ((images, texts),) = batches(ready(preprocessing, coco(val=4, train=3), calibration_root=str(folder)), 4)
    assert len(images) == 2
    assert {tuple(t.tolist()) for t in texts} == {tuple(t.tolist()) for t in preprocessing.tokenizer(["one", "two"])}


def test_a_calibration_root_without_captions_gives_no_texts_and_says_so(coco, preprocessing, tmp_path, draw, caplog):
    draw(tmp_path / "pictures" / "a.jpg", 900)
    data = ready(preprocessing, coco(val=4, train=3), calibration_root=str(tmp_path / "pictures"))
    with caplog.at_level(logging.WARNING):
        ((images, texts),) = batches(data, 1)
    assert len(images) == 1
    assert texts is None
    assert "no captions" in caplog.text


def test_an_empty_calibration_root_is_an_error(coco, preprocessing, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "absent"):
        with pytest.raises(DataError, match="holds no pictures"):
            ready(preprocessing, coco(val=4, train=3), calibration_root=str(tmp_path / folder))


def test_a_damaged_calibration_picture_is_named_or_passed_over(coco, preprocessing):
    root = coco(val=4, train=3)
    broken = root / "train2017/train2017_001.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(DataError, match=r"train2017_001\.jpg cannot be decoded"):
        batches(ready(preprocessing, root), 3)
    assert sum(len(images) for images, _ in batches(ready(preprocessing, root, on_error="skip"), 3)) == 2


def test_copies_inside_one_data_set_never_calibrate(tmp_path, draw):
    evaluation = [Picture(draw(tmp_path / "a.jpg", 0))]
    copy, other = Picture(tmp_path / "copy.jpg"), Picture(draw(tmp_path / "b.jpg", 1))
    shutil.copy(evaluation[0].path, copy.path)
    assert choose_pictures([copy, other], evaluation, 2, 0, "raise", foreign=False) == [other]
    with pytest.raises(CalibrationError, match="No calibration picture"):
        choose_pictures([copy], evaluation, 1, 0, "raise", foreign=False)


@pytest.mark.parametrize(("samples", "batch_size"), [(0, 4), (4, 0)])
def test_sizes_below_one_are_refused(coco, preprocessing, samples, batch_size):
    data = ready(preprocessing, coco(val=4, train=3))
    with pytest.raises(ConfigError, match="at least 1"):
        data.calibration_dataloader(samples, batch_size, 0)


def test_the_permutation_leaves_the_global_generator_alone():
    state = torch.random.get_rng_state()
    assert sorted(permutation(50, 3)) == list(range(50))
    assert torch.equal(torch.random.get_rng_state(), state)
