"""Data as people have it: what is absent, blank or not read is named, or left out and counted."""

import csv
import json
import shutil
import unicodedata
from collections import Counter

import pytest
from PIL import Image

from datamodules import CocoRetrieval, Flickr8kRetrieval, Flickr30kRetrieval, ImageFolderClassification, VQAv2
from datamodules.captions import read_coco_captions, read_karpathy, read_table
from datamodules.vqa_files import read_questions
from lit_clipq.errors import DataError

NFC, NFD = (unicodedata.normalize(form, "Müller.jpg") for form in ("NFC", "NFD"))


def ready(data, preprocessing):
    data.preprocessing = preprocessing
    data.prepare_data()
    data.setup("validate")
    return data


def coco_file(path, captions):
    """`captions`: picture -> its captions."""
    images = [{"id": i, "file_name": name} for i, name in enumerate(captions)]
    rows = [{"image_id": i, "caption": text} for i, texts in enumerate(captions.values()) for text in texts]
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"images": images, "annotations": [{"id": j, **row} for j, row in enumerate(rows)]}))
    return path


def karpathy_file(path, captions):
    rows = [
        {"filename": name, "imgid": i, "split": "test", "sentences": [{"raw": text} for text in texts]}
        for i, (name, texts) in enumerate(captions.items())
    ]
    path.write_text(json.dumps({"images": rows}))
    return path


def table_file(path, captions):
    lines = [f"{name},{text}" for name, texts in captions.items() for text in texts]
    path.write_text("\n".join(["image,caption", *lines]))
    return path


CAPTIONS = {"a.jpg": ["one", " ", "two", "three"], "b.jpg": ["", "\t"], "c.jpg": ["four"], "d.jpg": ["  "]}
KEPT = {"a.jpg": ("one", "two", "three"), "c.jpg": ("four",)}
READERS = {
    "coco": (coco_file, lambda path, gaps: read_coco_captions(path, path.parent, gaps=gaps)),
    "karpathy": (karpathy_file, lambda path, gaps: read_karpathy(path, path.parent, {"test"}, gaps=gaps)),
    "table": (table_file, lambda path, gaps: read_table(path, path.parent, gaps=gaps)),
}


@pytest.mark.parametrize("form", READERS)
def test_blank_captions_are_named_or_left_out_and_counted(tmp_path, form):
    write, read = READERS[form]
    path = write(tmp_path / "captions.txt", CAPTIONS)
    with pytest.raises(DataError, match=r"captions\.txt"):
        read(path, None)
    gaps = Counter()
    assert {picture.path.name: picture.captions for picture in read(path, gaps)} == KEPT
    assert gaps == {"blank_captions": 4, "pictures_without_captions": 2}


@pytest.mark.parametrize("form", ["coco", "karpathy"])
def test_pictures_without_captions_are_counted(tmp_path, form):
    write, read = READERS[form]
    path = write(tmp_path / "captions.json", {"a.jpg": ["one"], "b.jpg": []})
    gaps = Counter()
    assert [picture.path.name for picture in read(path, gaps)] == ["a.jpg"]
    assert +gaps == {"pictures_without_captions": 1}


def test_the_first_captions_are_the_first_with_text(tmp_path):
    path = coco_file(tmp_path / "captions.json", CAPTIONS)
    pictures = read_coco_captions(path, tmp_path, 2, Counter())
    assert [picture.captions for picture in pictures] == [("one", "two"), ("four",)]


def test_skipping_counts_gaps_and_damage_apart(tmp_path, draw, preprocessing):
    captions = {**CAPTIONS, "missing.jpg": ["five"]}
    coco_file(tmp_path / "annotations" / "captions_val2017.json", captions)
    for i, name in enumerate(CAPTIONS):
        draw(tmp_path / "val2017" / name, i)
    calibration = tmp_path / "calibration"
    draw(calibration / "x.jpg", 77)
    options = {"preset": "val2017", "calibration_root": str(calibration)}
    with pytest.raises(DataError, match=r"empty or no text, for a\.jpg.*on_error skip"):
        ready(CocoRetrieval(str(tmp_path), **options), preprocessing)
    data = ready(CocoRetrieval(str(tmp_path), on_error="skip", **options), preprocessing)
    counts = data.sample_counts()
    assert {name: counts[name] for name in ("images", "captions", "skipped")} == {
        "images": 2,
        "captions": 4,
        "skipped": 1,
    }
    assert (counts["blank_captions"], counts["pictures_without_captions"]) == (4, 2)
    assert "files_not_read" not in counts


def test_blank_captions_of_calibration_pictures_are_left_out_too(tmp_path, draw, preprocessing):
    for split, name in (("val2017", "a.jpg"), ("train2017", "b.jpg")):
        coco_file(tmp_path / "annotations" / f"captions_{split}.json", {name: ["one", " ", "two"]})
        draw(tmp_path / split / name, len(split))
    data = ready(CocoRetrieval(str(tmp_path), preset="val2017", on_error="skip"), preprocessing)
    ((images, texts),) = data.calibration_dataloader(4, 4, 0)
    assert len(images) == len(texts) == 1
    assert data.sample_counts()["blank_captions"] == 1  # of what is evaluated


@pytest.mark.parametrize(("on_disk", "written"), [(NFC, NFD), (NFD, NFC)])
def test_letters_composed_otherwise_are_the_same_name(tmp_path, draw, preprocessing, on_disk, written):
    for i, name in enumerate((on_disk, "other.jpg", "third.jpg")):
        draw(tmp_path / "images" / name, i)
    table_file(tmp_path / "captions.txt", {written: ["one"], "other.jpg": ["two"], "third.jpg": ["three"]})
    data = ready(Flickr8kRetrieval(str(tmp_path), held_out_calibration=1), preprocessing)
    assert data.sample_counts()["images"] == 2
    assert data.sample_counts()["skipped"] == 0


@pytest.mark.parametrize(("listed", "written"), [(NFC, NFD), (NFD, NFC)])
def test_a_list_of_test_pictures_may_compose_them_otherwise(tmp_path, draw, preprocessing, listed, written):
    for i, name in enumerate((NFC, "other.jpg")):
        draw(tmp_path / "images" / name, i)
    rows = ["image_name| comment_number| comment", f"{written}| 0| one", "other.jpg| 0| two"]
    (tmp_path / "results.csv").write_text("\n".join(rows))
    (tmp_path / "flickr30k_test.txt").write_text(listed)
    data = ready(Flickr30kRetrieval(str(tmp_path)), preprocessing)
    assert [picture.captions for picture in data.pictures] == [("one",)]


def test_class_folders_may_be_composed_otherwise_than_their_names(tmp_path, draw, preprocessing):
    draw(tmp_path / unicodedata.normalize("NFD", "Käfer") / "a.jpg", 0)
    draw(tmp_path / "Hund" / "b.jpg", 1)
    classes = {"Hund": "dog", unicodedata.normalize("NFC", "Käfer"): "beetle"}
    (tmp_path / "classes.json").write_text(json.dumps(classes), encoding="utf-8-sig")
    data = ready(ImageFolderClassification(str(tmp_path), held_out_calibration=1), preprocessing)
    assert data.class_names == ["dog", "beetle"]
    labels = {picture.path.name: picture.label for picture in (*data.pictures, *data._pool)}
    assert labels == {"a.jpg": 1, "b.jpg": 0}


def test_class_folders_read_every_format_and_count_the_rest(tmp_path, preprocessing, caplog):
    kinds = {"a.jpg": "JPEG", "b.jfif": "JPEG", "c.gif": "GIF", "d.ppm": "PPM", "e.avif": "AVIF", "f.webp": "WEBP"}
    (tmp_path / "dog").mkdir()
    for i, (name, kind) in enumerate(kinds.items()):
        Image.new("RGB", (16, 16), (40 * i, 0, 0)).save(tmp_path / "dog" / name, kind)
    for name in ("g.heic", "h.heic", "i.svg", ".DS_Store"):
        (tmp_path / "dog" / name).write_text("x")
    (tmp_path / "classes.json").write_text('{"dog": "dog"}')
    data = ready(ImageFolderClassification(str(tmp_path), held_out_calibration=1), preprocessing)
    counts = data.sample_counts()
    assert (counts["images"], counts["files_not_read"]) == (5, 3)
    assert "not read: .heic 2, .svg 1" in caplog.text


def test_a_class_folder_with_nothing_that_is_read_says_what_it_has(tmp_path, draw, preprocessing):
    draw(tmp_path / "dog" / "a.jpg", 0)
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "b.heic").write_text("x")
    (tmp_path / "classes.json").write_text('{"dog": "dog", "cat": "cat"}')
    with pytest.raises(DataError, match=r"cat holds no pictures \(but files that are not read: \.heic 1\)"):
        ready(ImageFolderClassification(str(tmp_path)), preprocessing)


def test_real_pictures_that_are_links_into_a_cache_are_those_they_link_to(tmp_path, real_data, preprocessing):
    source = real_data / "flickr8k"
    (tmp_path / "images").mkdir()
    (tmp_path / "blobs").mkdir()
    with open(source / "captions.txt", newline="", encoding="utf-8") as file:
        names = list(dict.fromkeys(row[0] for row in list(csv.reader(file))[1:]))[:6]
    for number, name in enumerate(names):
        shutil.copy(source / "images" / name, tmp_path / "blobs" / f"{number:040x}")
        (tmp_path / "images" / name).symlink_to(f"../blobs/{number:040x}")
    shutil.copy(source / "captions.txt", tmp_path)
    data = ready(Flickr8kRetrieval(str(tmp_path), on_error="skip", limit=6, held_out_calibration=1), preprocessing)
    assert data.sample_counts()["images"] == 5
    assert {picture.path.name for picture in (*data.pictures, *data._pool)} == set(names)


# Questions


def question_files(folder, texts):
    asked = [{"question_id": i, "image_id": i, "question": text} for i, text in enumerate(texts)]
    answers = [{"answer": "yes"}] * 10
    common = {"answers": answers, "answer_type": "yes/no", "question_type": "is", "multiple_choice_answer": "yes"}
    answered = [{"question_id": i, "image_id": i, **common} for i in range(len(texts))]
    paths = []
    for name, content in (("questions", asked), ("annotations", answered)):
        paths.append(folder / f"{name}.json")
        paths[-1].write_text(json.dumps({name: content}))
    return paths


def test_blank_questions_are_named_or_left_out_and_counted(tmp_path):
    paths = question_files(tmp_path, ["is it?", " ", "why?", ""])
    with pytest.raises(DataError, match=r"2 questions without text \(question_id 1, 3\).*on_error skip"):
        read_questions(*paths)
    gaps = Counter()
    assert [question.text for question in read_questions(*paths, gaps)] == ["is it?", "why?"]
    assert gaps == {"blank_questions": 2}


def test_blank_questions_stand_in_the_counts(tmp_path, draw, preprocessing):
    questions, annotations = question_files(tmp_path, ["is it?", " ", "why?"])
    questions.rename(tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json")
    annotations.rename(tmp_path / "v2_mscoco_val2014_annotations.json")
    for i in range(3):
        draw(tmp_path / "val2014" / f"COCO_val2014_{i:012d}.jpg", i)
    draw(tmp_path / "calibration" / "x.jpg", 9)
    data = VQAv2(str(tmp_path), on_error="skip", calibration_root=str(tmp_path / "calibration"))
    data.count_answers = lambda: data_vocabulary()
    data._splits = lambda: ("val",)
    counts = ready(data, preprocessing).sample_counts()
    assert {name: counts[name] for name in ("questions", "images", "blank_questions")} == {
        "questions": 2,
        "images": 2,
        "blank_questions": 1,
    }


def data_vocabulary():
    from lit_clipq.metrics.functional import AnswerVocabulary

    return AnswerVocabulary(("yes",), (3,), 1)
