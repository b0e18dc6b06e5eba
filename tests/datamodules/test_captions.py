import csv
import json

import pytest

from datamodules.captions import read_captioned_folder, read_coco_captions, read_json, read_karpathy, read_table
from lit_clipq.errors import DataError


def write_coco(path, images, annotations):
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return path


def test_truncated_json_is_named(tmp_path):
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({"images": [{"id": 1}]})[:-4])
    with pytest.raises(DataError, match=r"captions\.json is not valid JSON.*truncated"):
        read_json(path)


@pytest.mark.parametrize("content", ["[]", '{"images": 3}', '{"images": [{"id": 1}], "annotations": []}', "{}", "null"])
def test_json_of_another_layout_is_named(tmp_path, content):
    path = tmp_path / "captions.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"captions\.json is not in COCO caption format"):
        read_coco_captions(path, tmp_path)
    if content not in ("[]", '{"images": [{"id": 1}], "annotations": []}'):
        with pytest.raises(DataError, match=r"captions\.json is not a Karpathy"):
            read_karpathy(path, tmp_path, {"test"})


def test_reading_coco_prints_nothing(tmp_path, capsys):
    path = write_coco(
        tmp_path / "c.json", [{"id": 1, "file_name": "a.jpg"}], [{"id": 1, "image_id": 1, "caption": "x"}]
    )
    read_coco_captions(path, tmp_path)
    assert capsys.readouterr().out == ""


def test_captions_of_unlisted_pictures_are_an_error(tmp_path):
    rows = [{"id": i, "image_id": i, "caption": "x"} for i in (1, 77)]
    path = write_coco(tmp_path / "c.json", [{"id": 1, "file_name": "a.jpg"}], rows)
    with pytest.raises(DataError, match=r"captions of 1 pictures that it does not list .*77"):
        read_coco_captions(path, tmp_path)


def test_pictures_without_captions_are_an_error(tmp_path):
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in (1, 2)]
    path = write_coco(tmp_path / "c.json", images, [{"id": 1, "image_id": 1, "caption": "x"}])
    with pytest.raises(DataError, match=r"1 pictures without captions \(2\.jpg\)"):
        read_coco_captions(path, tmp_path)


@pytest.mark.parametrize("caption", ["", "  \n", None, 3])
def test_captions_without_text_are_an_error(tmp_path, caption):
    rows = [{"id": 1, "image_id": 1, "caption": caption}]
    path = write_coco(tmp_path / "c.json", [{"id": 1, "file_name": "a.jpg"}], rows)
    with pytest.raises(DataError, match=r"empty or no text, for a\.jpg"):
        read_coco_captions(path, tmp_path)


@pytest.mark.parametrize("images", [[(1, "a.jpg"), (1, "b.jpg")], [(1, "a.jpg"), (2, "a.jpg")]])
def test_pictures_listed_twice_are_an_error(tmp_path, images):
    rows = [{"id": i, "image_id": key, "caption": "x"} for i, (key, _) in enumerate(images)]
    path = write_coco(tmp_path / "c.json", [{"id": key, "file_name": name} for key, name in images], rows)
    with pytest.raises(DataError, match=r"twice|more than once"):
        read_coco_captions(path, tmp_path)


def test_an_annotation_that_leaves_the_folder_is_an_error(tmp_path):
    rows = [{"id": 1, "image_id": 1, "caption": "x"}]
    path = write_coco(tmp_path / "c.json", [{"id": 1, "file_name": "../../a.jpg"}], rows)
    with pytest.raises(DataError, match="leaves"):
        read_coco_captions(path, tmp_path)


def test_karpathy_rows_keep_all_captions_and_their_folder(karpathy):
    pictures = read_karpathy(karpathy / "dataset_coco.json", karpathy, {"restval", "train"})
    assert [p.path.parent.name for p in pictures] == ["val2014"] * 4 + ["train2014"] * 3
    test = read_karpathy(karpathy / "dataset_coco.json", karpathy, {"test"})
    assert [len(p.captions) for p in test] == [7, 5, 5, 5, 5, 5]
    assert test[0].captions[6] == "test picture 0 caption 6"
    assert len(read_karpathy(karpathy / "dataset_coco.json", karpathy, {"test"}, 2)[0].captions) == 2


@pytest.mark.parametrize(("field", "value"), [("filepath", "../x"), ("filename", "../x.jpg"), ("filepath", "/etc")])
def test_karpathy_names_that_leave_the_folder_are_an_error(karpathy, field, value):
    file = karpathy / "dataset_coco.json"
    content = json.loads(file.read_text())
    content["images"][1][field] = value
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match="leaves"):
        read_karpathy(file, karpathy, {"test"})


def test_a_split_without_rows_is_empty(karpathy, tmp_path):
    assert read_karpathy(karpathy / "dataset_coco.json", karpathy, {"val"}) == []
    (tmp_path / "captions.txt").write_text(TABLES["comma"])
    assert read_table(tmp_path / "captions.txt", tmp_path, {"z.jpg"}) == []


TABLES = {
    "comma": 'image,caption\na.jpg,"A dog , and ""Rex"" ."\nb.jpg,A "red" one, here\na.jpg,Two dogs .\n',
    "pipe": 'image_name| comment_number| comment\na.jpg| 0| A dog , and "Rex" .\nb.jpg| 0| A "red" one, here\n'
    "a.jpg| 1   Two dogs .\n",
    "token": 'a.jpg#0\tA dog , and "Rex" .\nb.jpg#0\tA "red" one, here\na.jpg#1\tTwo dogs .\n',
}


@pytest.mark.parametrize("text", TABLES.values(), ids=TABLES)
def test_the_three_table_formats_say_the_same(tmp_path, text):
    path = tmp_path / "table"
    path.write_text(text)
    pictures = read_table(path, tmp_path)
    assert {p.path.name: p.captions for p in pictures} == {
        "a.jpg": ('A dog , and "Rex" .', "Two dogs ."),
        "b.jpg": ('A "red" one, here',),
    }


@pytest.mark.parametrize("line", ["c.jpg", "c.jpg,", ",text", "c.jpg, "])
def test_a_line_without_picture_or_caption_is_named(tmp_path, line):
    path = tmp_path / "captions.txt"
    path.write_text(f"image,caption\na.jpg,x\n{line}\n")
    with pytest.raises(DataError, match=r"captions\.txt, line 3"):
        read_table(path, tmp_path)


def test_an_empty_table_and_a_binary_one_are_errors(tmp_path):
    path = tmp_path / "captions.txt"
    path.write_text("image,caption\n")
    with pytest.raises(DataError, match="no pictures"):
        read_table(path, tmp_path)
    path.write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(DataError, match="not UTF-8"):
        read_table(path, tmp_path)


def test_flickr8k_agrees_with_the_csv_module(real_data):
    table = real_data / "flickr8k" / "captions.txt"
    with open(table, newline="", encoding="utf-8") as file:
        rows = [(name, caption.strip()) for name, caption in list(csv.reader(file))[1:]]
    pictures = read_table(table, real_data / "flickr8k" / "images")
    ours = [(p.path.name, caption) for p in pictures for caption in p.captions]
    assert sorted(ours) == sorted(rows)
    assert len(ours) == 5000


def test_folders_with_captions_are_recognised(coco, karpathy, tmp_path):
    assert {p.path.parent.name for p in read_captioned_folder(coco(val=3, train=2))} == {"train2017"}
    assert len(read_captioned_folder(karpathy)) == 7
    flickr = tmp_path / "flickr"
    (flickr / "Images").mkdir(parents=True)
    (flickr / "captions.txt").write_text(TABLES["comma"])
    assert {p.path for p in read_captioned_folder(flickr)} == {flickr / "Images/a.jpg", flickr / "Images/b.jpg"}
    assert read_captioned_folder(flickr / "Images") == []
