import json

import pytest

from datamodules import Flickr8kRetrieval, Flickr30kRetrieval
from lit_clipq.errors import ConfigError, DataError


@pytest.fixture
def flickr30k(tmp_path, draw):
    """Six pictures, 1 and 4 are the test split; captions in each of the published forms."""

    def write(form: str):
        root = tmp_path / form
        for i in range(6):
            draw(root / "flickr30k-images" / f"{i}.jpg", i)
        rows = [(f"{i}.jpg", k, f"picture {i} , caption {k} .") for i in range(6) for k in range(5)]
        if form == "karpathy":
            images = [
                {
                    "filename": f"{i}.jpg",
                    "split": "test" if i in (1, 4) else "val" if i == 5 else "train",
                    "sentences": [{"raw": text} for name, _, text in rows if name == f"{i}.jpg"],
                }
                for i in range(6)
            ]
            (root / "dataset_flickr30k.json").write_text(json.dumps({"images": images}))
        elif form == "csv":
            lines = ["image_name| comment_number| comment", *(f"{n}| {k}| {text}" for n, k, text in rows)]
            (root / "results.csv").write_text("\n".join(lines))
            (root / "flickr30k_test.txt").write_text("1.jpg\n4.jpg\n")
        else:
            (root / "results_20130124.token").write_text("\n".join(f"{n}#{k}\t{text}" for n, k, text in rows))
            (root / "test.txt").write_text("1\n4\n")
        return root

    return write


def ready(data, preprocessing):
    data.preprocessing = preprocessing
    data.prepare_data()
    data.setup()
    return data


@pytest.mark.parametrize("form", ["karpathy", "csv", "token"])
def test_the_test_split_is_evaluated_and_the_rest_calibrates(flickr30k, preprocessing, form):
    data = ready(Flickr30kRetrieval(str(flickr30k(form))), preprocessing)
    assert [picture.path.name for picture in data.pictures] == ["1.jpg", "4.jpg"]
    assert data.pictures[1].captions == tuple(f"picture 4 , caption {k} ." for k in range(5))
    assert {picture.path.name for picture in data._pool} == {"0.jpg", "2.jpg", "3.jpg", "5.jpg"}
    assert data.sample_counts()["calibration_held_out"] == 0


def test_a_table_without_a_test_list_is_an_error(flickr30k):
    root = flickr30k("csv")
    (root / "flickr30k_test.txt").unlink()
    with pytest.raises(DataError, match=r"does not tell the test pictures apart.*dataset_flickr30k\.json"):
        Flickr30kRetrieval(str(root)).prepare_data()


@pytest.mark.parametrize("download", [False, True])
def test_absent_data_says_how_to_get_it(tmp_path, download):
    with pytest.raises(DataError, match=r"dataset_flickr30k\.json.*on request only.*form"):
        Flickr30kRetrieval(str(tmp_path), download=download).prepare_data()


def test_flickr8k_evaluates_all_but_a_slice(real_data, preprocessing):
    data = ready(Flickr8kRetrieval(str(real_data / "flickr8k")), preprocessing)
    counts = data.sample_counts()
    assert (counts["images"], counts["captions"], counts["calibration_held_out"]) == (900, 4500, 100)


def test_flickr8k_test_split(tmp_path, preprocessing, draw):
    for i in range(4):
        draw(tmp_path / "Flicker8k_Dataset" / f"{i}.jpg", i)
    (tmp_path / "Flickr8k.token.txt").write_text("".join(f"{i}.jpg#0\tpicture {i}\n" for i in range(4)))
    with pytest.raises(DataError, match="does not tell the test pictures apart"):
        Flickr8kRetrieval(str(tmp_path), split="test").prepare_data()
    (tmp_path / "Flickr_8k.testImages.txt").write_text("3.jpg\n")
    data = ready(Flickr8kRetrieval(str(tmp_path), split="test"), preprocessing)
    assert [picture.path.name for picture in data.pictures] == ["3.jpg"]
    assert len(data._pool) == 3
    with pytest.raises(ConfigError, match="split"):
        Flickr8kRetrieval(str(tmp_path), split="train")


def test_a_list_of_test_pictures_that_is_no_text_is_named(tmp_path, preprocessing):
    (tmp_path / "Flickr8k.token.txt").write_text("0.jpg#0\tpicture\n")
    (tmp_path / "Flickr_8k.testImages.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"testImages\.txt is not UTF-8 text"):
        ready(Flickr8kRetrieval(str(tmp_path), split="test"), preprocessing)


def test_only_line_ends_end_a_caption(tmp_path, draw):
    draw(tmp_path / "images" / "0.jpg", 0)
    (tmp_path / "captions.txt").write_bytes("image,caption\r\n0.jpg,one\u0085line\u2028only\r\n".encode())
    (picture,) = Flickr8kRetrieval(str(tmp_path)).read_evaluation()
    assert picture.captions == ("one\u0085line\u2028only",)
