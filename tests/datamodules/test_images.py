import os
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from datamodules.images import (
    ContentIndex,
    Picture,
    are_files,
    list_pictures,
    paths_inside,
    usable_pictures,
)
from lit_clipq.errors import DataError
from lit_clipq.pictures import damage, load_rgb


@pytest.fixture
def pictures(tmp_path, draw):
    return [Picture(draw(tmp_path / "p" / f"{i}.jpg", i, (64, 48))) for i in range(6)]


def truncate(path: Path, keep: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


@pytest.mark.parametrize("name", ["../x.jpg", "a/../../x.jpg", "/etc/x.jpg", "..", "C:\\x.jpg", "a\\..\\..\\x.jpg", ""])
def test_names_that_leave_the_folder_are_refused(tmp_path, name):
    with pytest.raises(DataError, match=r"file\.json names the picture"):
        paths_inside(tmp_path, ["fine.jpg", name], Path("file.json"))


def test_linked_files_are_read_and_names_through_folders_that_link_out_are_refused(tmp_path, draw):
    folder = tmp_path / "in"
    draw(folder / "real.jpg", 0)
    (folder / "inside.jpg").symlink_to(folder / "real.jpg")
    (folder / "outside.jpg").symlink_to(draw(tmp_path / "out" / "x.jpg", 1))  # a cache with its blobs elsewhere
    (folder / "sub").symlink_to(tmp_path / "out")
    names = ["real.jpg", "inside.jpg", "outside.jpg", "absent.jpg"]
    assert paths_inside(folder, names, Path("a.json")) == [folder / name for name in names]
    assert load_rgb(folder / "outside.jpg").tobytes() == load_rgb(tmp_path / "out" / "x.jpg").tobytes()
    for name in ("sub/x.jpg", "sub/../sub/x.jpg", "../out/x.jpg"):
        with pytest.raises(DataError, match=r"out of|leaves"):
            paths_inside(folder, [name], Path("a.json"))


def test_a_link_to_nothing_says_what_it_links_to(tmp_path, draw):
    good = Picture(draw(tmp_path / "good.jpg", 0))
    (tmp_path / "annex.jpg").symlink_to(".git/annex/objects/key")
    with pytest.raises(DataError, match=r"annex\.jpg is a link to \.git/annex/objects/key, which is missing"):
        usable_pictures([good, Picture(tmp_path / "annex.jpg")], "raise", None)
    assert usable_pictures([good, Picture(tmp_path / "annex.jpg")], "skip", None) == ([good], 1)


@pytest.mark.parametrize(("asked", "there"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_composed_and_decomposed_letters_name_the_same_file(tmp_path, draw, asked, there):
    name = "Café/Müller.jpg"
    path = draw(tmp_path / unicodedata.normalize(there, name), 0)
    (found,) = paths_inside(tmp_path, [unicodedata.normalize(asked, name)], Path("a.json"))
    assert found == path
    assert are_files([found]) == [True]


def test_of_two_files_that_differ_in_composition_only_each_is_found_by_its_own_name(tmp_path, draw):
    names = [unicodedata.normalize(form, "é.jpg") for form in ("NFC", "NFD")]
    paths = [draw(tmp_path / name, number) for number, name in enumerate(names)]
    assert paths_inside(tmp_path, names, Path("a.json")) == paths


def test_the_picture_folder_itself_may_be_a_link(tmp_path, draw):
    draw(tmp_path / "disk" / "x.jpg", 0)
    (tmp_path / "val").symlink_to(tmp_path / "disk")
    (path,) = paths_inside(tmp_path / "val", ["x.jpg"], Path("a.json"))
    assert are_files([path]) == [True]


def test_are_files_agrees_with_isfile(tmp_path, draw):
    draw(tmp_path / "a.jpg", 0)
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "link.jpg").symlink_to(tmp_path / "a.jpg")
    paths = [tmp_path / n for n in ("a.jpg", "folder.jpg", "dangling.jpg", "link.jpg", "no.jpg", "no/such/a.jpg")]
    assert are_files(paths) == [os.path.isfile(path) for path in paths]


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".bmp", ".gif", ".tif", ".ppm", ".avif", ".jp2"])
@pytest.mark.parametrize("keep", [0.0, 0.2, 0.9])
def test_truncated_pictures_are_damaged(tmp_path, draw, suffix, keep):
    path = draw(tmp_path / f"x{suffix}", 0, (200, 300))
    assert damage(path) is None
    truncate(path, keep)
    assert damage(path).startswith("cannot be decoded")
    with pytest.raises(DataError, match=str(path)):
        load_rgb(path)


def test_a_jpeg_without_its_last_bytes_is_damaged(tmp_path, draw):
    path = draw(tmp_path / "x.jpg", 0, (64, 64))
    path.write_bytes(path.read_bytes()[:-2])
    assert damage(path)


def test_raise_names_the_missing_picture_and_how_many(pictures):
    pictures[2].path.unlink()
    pictures[4].path.unlink()
    with pytest.raises(DataError, match=r"2\.jpg is missing \(2 such of 6 pictures, 4\.jpg\).*on_error skip"):
        usable_pictures(pictures, "raise", None)


def test_raise_names_the_damaged_picture(pictures):
    truncate(pictures[3].path, 0.5)
    with pytest.raises(DataError, match=r"3\.jpg cannot be decoded"):
        usable_pictures(pictures, "raise", None)


def test_raise_looks_at_the_first_pictures_only(pictures):
    pictures[4].path.unlink()
    assert usable_pictures(pictures, "raise", 4) == (pictures[:4], 0)


def test_skip_leaves_out_and_counts(pictures):
    pictures[0].path.unlink()
    truncate(pictures[3].path, 0.5)
    kept = [pictures[i] for i in (1, 2, 4, 5)]
    assert usable_pictures(pictures, "skip", None) == (kept, 2)
    assert usable_pictures(pictures, "skip", 2) == (kept[:2], 1)


def test_no_usable_picture_is_an_error_even_when_skipping(tmp_path):
    with pytest.raises(DataError, match="None of 1 pictures"):
        usable_pictures([Picture(tmp_path / "no.jpg")], "skip", None)


def test_listing_passes_over_hidden_and_other_files(tmp_path, draw):
    wanted = [draw(tmp_path / "b" / "1.PNG", 0), draw(tmp_path / "a.jpg", 1)]
    draw(tmp_path / ".cache" / "x.jpg", 2)
    draw(tmp_path / ".y.jpg", 2)
    (tmp_path / "notes.txt").write_text("x")
    assert list_pictures(tmp_path) == sorted(wanted)


@pytest.mark.parametrize(
    "suffix", [".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".webp",
               ".avif", ".jp2", ".JPG"]
)  # fmt: skip
def test_every_suffix_of_a_format_that_is_decoded_is_listed(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    Image.new("RGB", (4, 4), "red").save(path, Image.registered_extensions()[suffix.lower()])
    assert list_pictures(tmp_path) == [path]
    assert damage(path) is None


def test_files_that_are_not_read_are_counted_by_suffix_or_told(tmp_path, draw, caplog):
    draw(tmp_path / "a.jpg", 0)
    for name in ("b.heic", "sub/c.HEIC", "sub/d.svg", "README", ".hidden.heic"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    unread = Counter()
    assert len(list_pictures(tmp_path, unread)) == 1
    assert unread == {".heic": 2, ".svg": 1, "(no suffix)": 1}
    assert caplog.text == ""
    (tmp_path / "notes.txt").touch()
    list_pictures(tmp_path)
    assert "not read: .heic 2, (no suffix) 1, .svg 1" in caplog.text


def test_twins_are_found_by_identity_and_content(tmp_path, draw):
    original = draw(tmp_path / "a.bmp", 0)
    other = draw(tmp_path / "b.bmp", 1)  # same size, other content
    copy = tmp_path / "copy.bmp"
    copy.write_bytes(original.read_bytes())
    link = tmp_path / "link.bmp"
    link.symlink_to(original)
    index = ContentIndex([original])
    assert original.stat().st_size == other.stat().st_size
    assert [index.twin(path) for path in (copy, link, other)] == [original, original, None]


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, draw, monkeypatch):
    draw(tmp_path / "open" / "a.jpg", 1)
    draw(tmp_path / "shut" / "b.jpg", 2)
    real = os.scandir

    def scandir(path):
        if Path(path).name == "shut":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"shut cannot be read \(Permission denied\)"):
        list_pictures(tmp_path)
