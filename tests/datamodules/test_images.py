import os
from pathlib import Path

import pytest
from PIL import Image

from datamodules.images import (
    ContentIndex,
    Picture,
    are_files,
    damage,
    list_pictures,
    load_rgb,
    paths_inside,
    usable_pictures,
)
from lit_clipq.errors import DataError


@pytest.fixture
def pictures(tmp_path, draw):
    return [Picture(draw(tmp_path / "p" / f"{i}.jpg", i, (64, 48))) for i in range(6)]


def truncate(path: Path, keep: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


@pytest.mark.parametrize("name", ["../x.jpg", "a/../../x.jpg", "/etc/x.jpg", "..", "C:\\x.jpg", "a\\..\\..\\x.jpg", ""])
def test_names_that_leave_the_folder_are_refused(tmp_path, name):
    with pytest.raises(DataError, match=r"file\.json names the picture"):
        paths_inside(tmp_path, ["fine.jpg", name], Path("file.json"))


def test_links_out_of_the_folder_are_refused_and_links_inside_are_not(tmp_path, draw):
    folder = tmp_path / "in"
    draw(folder / "real.jpg", 0)
    (folder / "inside.jpg").symlink_to(folder / "real.jpg")
    (folder / "outside.jpg").symlink_to(draw(tmp_path / "out" / "x.jpg", 1))
    (folder / "sub").symlink_to(tmp_path / "out")
    paths_inside(folder, ["real.jpg", "inside.jpg", "absent.jpg"], Path("a.json"))
    for name in ("outside.jpg", "sub/x.jpg"):
        with pytest.raises(DataError, match="out of"):
            paths_inside(folder, [name], Path("a.json"))


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


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".bmp"])
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


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "I;16"])
def test_every_mode_is_loaded_as_rgb(tmp_path, mode):
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    Image.new(mode, (5, 4)).save(path)
    assert load_rgb(path).mode == "RGB"
    assert load_rgb(path).size == (5, 4)


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
