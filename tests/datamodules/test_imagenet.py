import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from open_clip import IMAGENET_CLASSNAMES

from datamodules import ImageFolderClassification, ImageNetV2
from datamodules.imagenet import imagenet_wnids
from lit_clipq.errors import ConfigError, DataError


def ready(data, preprocessing):
    data.preprocessing = preprocessing
    data.prepare_data()
    data.setup()
    return data


def labels_by_name(data):
    ids = torch.cat([batch["image_ids"] for batch in data.val_dataloader()])
    labels = torch.cat([batch["labels"] for batch in data.val_dataloader()])
    assert labels.dtype == torch.int64
    return {data.pictures[i].path.name: label for i, label in zip(ids.tolist(), labels.tolist(), strict=True)}


def test_wnids_are_those_of_real_pictures_in_sorted_order(real_data):
    assert imagenet_wnids() == sorted(path.stem for path in (real_data / "imagenet_1000").glob("*.jpg"))


@pytest.mark.parametrize("nested", [False, True])
def test_imagenetv2_folders_are_sorted_as_integers(tmp_path, real_data, preprocessing, nested):
    root = tmp_path / "imagenetv2-matched-frequency-format-val" if nested else tmp_path
    wnids = sorted(path.stem for path in (real_data / "imagenet_1000").glob("*.jpg"))
    for label in (0, 1, 2, 9, 10, 11, 100, 999):
        (root / str(label)).mkdir(parents=True)
        shutil.copy(real_data / "imagenet_1000" / f"{wnids[label]}.jpg", root / str(label))
    data = ready(ImageNetV2(str(tmp_path), held_out_calibration=1, batch_size=3), preprocessing)
    by_name = labels_by_name(data)
    assert len(by_name) == 7
    assert by_name == {name: wnids.index(name.removesuffix(".jpg")) for name in by_name}
    assert list(by_name.values()) == sorted(by_name.values())
    assert data.class_names == list(IMAGENET_CLASSNAMES)
    counts = data.sample_counts()
    assert (counts["images"], counts["calibration_held_out"], counts["classes"]) == (7, 1, 1000)


@pytest.mark.parametrize("name", ["1000", "n01440764", "-1", "٣"])
def test_other_folders_in_imagenetv2_are_named(tmp_path, draw, preprocessing, name):
    draw(tmp_path / "3" / "a.jpg", 0)
    draw(tmp_path / name / "b.jpg", 1)
    with pytest.raises(DataError, match=f"{name}.*class index"):
        ready(ImageNetV2(str(tmp_path)), preprocessing)


def test_two_folders_of_one_class_are_an_error(tmp_path, draw, preprocessing):
    for name in ("3", "03"):
        draw(tmp_path / name / "a.jpg", 0)
    with pytest.raises(DataError, match="expected one folder per class"):
        ready(ImageNetV2(str(tmp_path)), preprocessing)


@pytest.mark.parametrize("cls", [ImageNetV2, ImageFolderClassification])
def test_absent_data_says_what_is_expected_where(tmp_path, cls):
    with pytest.raises(DataError, match=f"{tmp_path}.*absent.*download true|{tmp_path}.*wnid"):
        cls(str(tmp_path)).prepare_data()


def test_a_part_of_imagenet_keeps_its_labels(tmp_path, draw, preprocessing):
    wnids = imagenet_wnids()
    for label in (5, 700):
        for i in range(3):
            draw(tmp_path / "val" / wnids[label] / f"{label}_{i}.JPEG", label + i)
    for i in range(4):
        draw(tmp_path / "train" / wnids[8] / f"{i}.JPEG", 5000 + i)
    data = ready(ImageFolderClassification(str(tmp_path)), preprocessing)
    assert labels_by_name(data) == {f"{label}_{i}.JPEG": label for label in (5, 700) for i in range(3)}
    assert data.class_names == list(IMAGENET_CLASSNAMES)
    assert data.sample_counts()["calibration_held_out"] == 0
    assert sum(len(images) for images, _ in data.calibration_dataloader(4, 2, 0)) == 4


def test_a_folder_that_is_no_class_is_named(tmp_path, draw, preprocessing):
    draw(tmp_path / "n01440764" / "a.jpg", 0)
    draw(tmp_path / "n99999999" / "b.jpg", 1)
    with pytest.raises(DataError, match=r"no class of ImageNet-1k, e\.g\. 'n99999999'"):
        ready(ImageFolderClassification(str(tmp_path)), preprocessing)
    (tmp_path / "n99999999").rename(tmp_path / "cats")
    with pytest.raises(DataError, match=r"'cats', which is no ImageNet wnid.*classes\.json"):
        ready(ImageFolderClassification(str(tmp_path)), preprocessing)


@pytest.mark.parametrize("content", [{"z": "red cube", "a": "blue ball", "unused": "x"}, ["red cube", "blue ball"]])
@pytest.mark.parametrize("above", [False, True])
def test_classes_json_names_the_folders(tmp_path, draw, preprocessing, content, above):
    folders = list(content)[:2] if isinstance(content, dict) else ["0", "1"]
    for label, name in enumerate(folders):
        for i in range(6):
            draw(tmp_path / "val" / name / f"{label}_{i}.png", 10 * label + i)
    (tmp_path if above else tmp_path / "val").joinpath("classes.json").write_text(json.dumps(content))
    data = ready(ImageFolderClassification(str(tmp_path / "val")), preprocessing)
    assert data.class_names == list(content.values() if isinstance(content, dict) else content)
    by_name = labels_by_name(data)
    assert len(by_name) == 11
    assert all(name.startswith(str(label)) for name, label in by_name.items())


@pytest.mark.parametrize("content", ["{}", "3", '{"a": 1}', '{"a": "x"'])
def test_a_bad_classes_json_is_named(tmp_path, draw, preprocessing, content):
    draw(tmp_path / "a" / "x.png", 0)
    (tmp_path / "classes.json").write_text(content)
    with pytest.raises(DataError, match=r"classes\.json"):
        ready(ImageFolderClassification(str(tmp_path)), preprocessing)


def test_an_empty_class_folder_is_named_or_passed_over(tmp_path, draw, preprocessing):
    (tmp_path / "n01440764").mkdir()
    for i in range(12):
        draw(tmp_path / "n01443537" / f"{i}.jpg", i)
    with pytest.raises(DataError, match="n01440764 holds no pictures"):
        ready(ImageFolderClassification(str(tmp_path)), preprocessing)
    data = ready(ImageFolderClassification(str(tmp_path), on_error="skip"), preprocessing)
    assert data.sample_counts()["images"] == 11


def test_calibration_prompts_are_drawn_by_the_seed_and_know_no_labels(tmp_path, draw, preprocessing):
    for name in ("0", "1"):
        for i in range(10):
            draw(tmp_path / name / f"{i}.jpg", 10 * int(name) + i)

    def prompts():
        data = ImageNetV2(str(tmp_path), templates=["a {} here"], held_out_calibration=8)
        ready(data, preprocessing)
        return torch.cat([texts for _, texts in data.calibration_dataloader(8, 4, 7)])

    texts = prompts()
    assert texts.shape == (8, preprocessing.context_length)
    every = preprocessing.tokenizer([f"a {name} here" for name in IMAGENET_CLASSNAMES])
    assert {tuple(row.tolist()) for row in texts} <= {tuple(row.tolist()) for row in every}
    (tmp_path / "1").rename(tmp_path / "2")  # other labels, same prompts
    assert torch.equal(prompts(), texts)


@pytest.mark.parametrize(("offered", "used"), [(["see the {}"], "see the {}"), (None, "a photo of a {}.")])
def test_prompts_are_the_tasks_unless_given(tmp_path, draw, preprocessing, offered, used):
    for i in range(4):
        draw(tmp_path / "0" / f"{i}.jpg", i)
    data = ImageNetV2(str(tmp_path), held_out_calibration=2)
    data.trainer = SimpleNamespace(lightning_module=SimpleNamespace(preprocessing=preprocessing, templates=offered))
    data.setup()
    every = preprocessing.tokenizer([used.format(name) for name in IMAGENET_CLASSNAMES])
    ((_, texts),) = data.calibration_dataloader(2, 2, 0)
    assert {tuple(row.tolist()) for row in texts} <= {tuple(row.tolist()) for row in every}


@pytest.mark.parametrize("templates", [[], ["a photo"], ["{}", "a photo"]])
def test_templates_need_a_place_for_the_name(templates):
    with pytest.raises(ConfigError, match=r"--data\.templates"):
        ImageNetV2("data", templates=templates)
