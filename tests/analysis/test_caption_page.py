"""The page of captions, read back with an HTML parser."""

import base64
import io
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lit_clipq.analysis.caption_page import CaptionRow, caption_page, write_caption_page

NASTY = '<script>alert("x")</script> & "quotes" \u00e9'


class Page(HTMLParser):
    """Cells of the table, attributes of the pictures, and every tag that occurs."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.images, self.tags, self.open, self.links = [], [], set(), [], []
        self.words = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        attributes = dict(attributes)
        self.links += [value for key, value in attributes.items() if key in ("src", "href")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append({"class": attributes.get("class", ""), "text": ""})
        if tag == "img":
            self.images.append(attributes)
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)
        if self.rows and {"td", "th"} & set(self.open):
            self.rows[-1][-1]["text"] += data + ("\n" if self.open[-1] == "li" else "")


@pytest.fixture
def picture(tmp_path) -> Path:
    path = tmp_path / 'a "b" & <c>.png'
    pixels = np.zeros((100, 400, 3), dtype=np.uint8)
    pixels[:, 200:] = (250, 0, 0)
    Image.fromarray(pixels).save(path)
    return path


def row(path, **options):
    values = {"quantized_caption": "a dog", "float_cider": 1.2346, "quantized_cider": 0.0, **options}
    return CaptionRow(7, path, ("one ref", NASTY), values.pop("float_caption", "a cat"), **values)


def test_cells_hold_the_texts_and_scores(picture):
    page = Page(caption_page([row(picture), row(picture, quantized_caption="a cat", quantized_cider=None)], NASTY))
    assert not page.open
    heads, first, second = page.rows
    assert [cell["text"] for cell in heads] == [
        "picture",
        "references",
        "float",
        "CIDEr (%)",
        "quantized",
        "CIDEr (%)",
    ]
    assert [cell["text"] for cell in first] == ["7", f"one ref\n{NASTY}\n", "a cat", "123.5", "a dog", "0.0"]
    assert [cell["text"] for cell in second][3:] == ["123.5", "a cat", ""]
    assert "changed" in first[4]["class"]
    assert "changed" not in second[4]["class"]
    assert page.words.count(NASTY) == 4  # title, heading, and a reference in either row


def test_nothing_of_the_texts_is_markup_and_nothing_is_loaded_from_elsewhere(picture):
    text = caption_page([row(picture, float_caption=NASTY, quantized_caption=NASTY)], NASTY, [NASTY])
    page = Page(text)
    assert "script" not in page.tags
    assert all(link.startswith("data:image/jpeg;base64,") for link in page.links)
    assert page.images[0]["alt"] == picture.name


def test_pictures_are_inside_and_small(picture):
    (image,) = Page(caption_page([row(picture)], "t", side=80)).images
    content = base64.b64decode(image["src"].partition(",")[2], validate=True)
    decoded = Image.open(io.BytesIO(content))
    assert (decoded.format, decoded.size) == ("JPEG", (80, 20))
    left, right = decoded.getpixel((10, 10)), decoded.getpixel((70, 10))
    assert max(left) < 20
    assert right[0] > 230


def test_small_pictures_keep_their_size(picture):
    (image,) = Page(caption_page([row(picture)], "t", side=1000)).images
    assert Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2]))).size == (400, 100)


def test_a_float_run_has_no_quantized_columns(picture):
    page = Page(caption_page([row(picture, quantized_caption=None, quantized_cider=None)], "t"))
    assert [len(cells) for cells in page.rows] == [4, 4]


def test_more_rows_than_the_limit_are_counted(picture):
    page = Page(caption_page([row(picture)] * 5, "t", ["CIDEr 40.1"], limit=2))
    assert len(page.rows) == 3
    assert "2 of 5 pictures" in page.words
    assert "CIDEr 40.1" in page.words


def test_a_picture_that_cannot_be_read_is_named(tmp_path, caplog):
    path = tmp_path / "gone.jpg"
    page = Page(caption_page([row(path)], "t"))
    assert page.rows[1][0]["text"] == "gone.jpg cannot be read7"
    assert "gone.jpg" in caplog.text


def test_the_page_is_written_whole_or_not_at_all(picture, tmp_path, monkeypatch):
    path = tmp_path / "out" / "page.html"
    write_caption_page(path, [row(picture)], "first")
    before = path.read_text(encoding="utf-8")
    assert before == caption_page([row(picture)], "first")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_caption_page(path, [row(picture)], "second")
    assert path.read_text(encoding="utf-8") == before
    assert [child.name for child in path.parent.iterdir()] == ["page.html"]
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match=r"No space left on device: .*page\.html"):
        write_caption_page(path, [row(picture)], "second")
