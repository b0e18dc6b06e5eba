"""Pictures of every kind become RGB as a viewer shows them, or are refused by name."""

import numpy as np
import pytest
from PIL import Image

from lit_clipq.errors import DataError
from lit_clipq.pictures import damage, load_rgb

GREY_16 = np.array([[0, 255, 256, 32768], [40000, 51200, 65279, 65535]], dtype=np.uint16)
GREY_8 = np.array([[0, 0, 1, 128], [156, 200, 254, 255]], dtype=np.uint8)


def shown(path):
    assert damage(path) is None
    return np.asarray(load_rgb(path))


def grey(values):
    return np.repeat(np.asarray(values, dtype=np.uint8)[..., None], 3, axis=2)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_sixteen_bits_of_grey_keep_their_high_byte(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    Image.fromarray(GREY_16).save(path)
    np.testing.assert_array_equal(shown(path), grey(GREY_8))


def test_sixteen_bits_are_shown_in_any_byte_order(tmp_path):
    path = tmp_path / "x.tif"
    Image.frombytes("I;16B", (4, 2), GREY_16.astype(">u2").tobytes()).save(path)
    np.testing.assert_array_equal(shown(path), grey(GREY_8))


def test_a_transparent_value_of_sixteen_bits_is_white(tmp_path):
    path = tmp_path / "x.png"
    Image.fromarray(GREY_16).save(path, transparency=40000)
    expected = GREY_8.copy()
    expected[1, 0] = 255
    np.testing.assert_array_equal(shown(path), grey(expected))


@pytest.mark.parametrize(
    ("mode", "suffix", "named"),
    [("F", ".tif", "32-bit float"), ("I", ".tif", "32-bit integer"), ("LAB", ".tif", "LAB"), ("F", ".pfm", "float")],
)
def test_pixels_without_agreed_white_are_refused_by_name(tmp_path, mode, suffix, named):
    path = tmp_path / f"x{suffix}"
    Image.new(mode, (4, 4)).save(path)
    assert named in damage(path)
    with pytest.raises(DataError, match=f"Picture {path} has .*{named}.*convert it"):
        load_rgb(path)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".jp2"])
def test_grey_with_alpha_lies_on_white(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    values = np.array([[[0, 255], [0, 0], [100, 0], [0, 51]]], dtype=np.uint8)  # (1, 4, grey and alpha)
    Image.fromarray(values, "LA").save(path, **({"irreversible": False} if suffix == ".jp2" else {}))
    np.testing.assert_array_equal(shown(path), grey([[0, 255, 255, 204]]))


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif"])
def test_transparent_colours_lie_on_white(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    values = np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 255, 51]]], dtype=np.uint8)
    Image.fromarray(values).save(path, **({"lossless": True, "exact": True} if suffix == ".webp" else {}))
    np.testing.assert_array_equal(shown(path), [[[255, 0, 0], [255, 255, 255], [204, 204, 255]]])


@pytest.mark.parametrize("suffix", [".png", ".gif"])
def test_a_transparent_entry_of_a_palette_is_white(tmp_path, suffix):
    picture = Image.new("P", (3, 1))
    picture.putpalette([10, 20, 30, 200, 100, 50, 1, 2, 3])
    picture.putdata([0, 1, 2])
    path = tmp_path / f"x{suffix}"
    picture.save(path, transparency=1)
    np.testing.assert_array_equal(shown(path), [[[10, 20, 30], [255, 255, 255], [1, 2, 3]]])


def test_a_transparent_colour_of_rgb_is_white(tmp_path):
    path = tmp_path / "x.png"
    Image.fromarray(np.array([[[1, 2, 3], [9, 9, 9]]], dtype=np.uint8)).save(path, transparency=(1, 2, 3))
    np.testing.assert_array_equal(shown(path), [[[255, 255, 255], [9, 9, 9]]])


@pytest.mark.parametrize("suffix", [".jpg", ".tif"])
@pytest.mark.parametrize(
    ("ink", "colour"),
    [((0, 0, 0, 0), (255, 255, 255)), ((0, 0, 0, 255), (0, 0, 0)), ((0, 255, 255, 0), (255, 0, 0))],
)
def test_cmyk_is_shown_in_its_colours(tmp_path, suffix, ink, colour):
    path = tmp_path / f"x{suffix}"
    Image.new("CMYK", (16, 16), ink).save(path, **({"quality": 100} if suffix == ".jpg" else {}))
    assert np.abs(shown(path).astype(int) - colour).max() <= 3  # JPEG rounds


@pytest.mark.parametrize(("mode", "value", "expected"), [("1", 1, 255), ("L", 77, 77), ("1", 0, 0)])
@pytest.mark.parametrize("suffix", [".png", ".bmp", ".gif", ".pbm"])
def test_black_and_white_and_grey(tmp_path, mode, value, expected, suffix):
    path = tmp_path / f"x{suffix}"
    Image.new(mode, (3, 2), value).save(path)
    np.testing.assert_array_equal(shown(path), np.full((2, 3, 3), expected))


# What each value of EXIF's orientation asks of the rows and columns that are stored.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("suffix", [".png", ".webp", ".jpg", ".tif"])
def test_the_cameras_orientation_is_applied(tmp_path, orientation, suffix):
    stored = np.zeros((16, 24, 3), dtype=np.uint8)
    stored[:8, :8, 0], stored[8:, 16:, 1], stored[:8, 16:, 2] = 255, 255, 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"x{suffix}"
    options = {".webp": {"lossless": True}, ".jpg": {"quality": 100, "subsampling": 0}}.get(suffix, {})
    Image.fromarray(stored).save(path, exif=exif, **options)
    found = shown(path)
    assert found.shape == UPRIGHT[orientation](stored).shape
    assert np.abs(found.astype(int) - UPRIGHT[orientation](stored)).max() <= (4 if suffix == ".jpg" else 0)


@pytest.mark.parametrize(
    "note", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"]
)
def test_a_damaged_note_of_the_camera_does_not_damage_the_picture(tmp_path, note):
    path = tmp_path / "x.jpg"
    Image.new("RGB", (8, 8), "red").save(path, exif=b"Exif\0\0" + note)
    assert np.abs(shown(path).astype(int) - (255, 0, 0)).max() <= 3


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png", ".tif", ".avif"])
def test_the_first_frame_or_page_is_taken(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    path = tmp_path / f"x{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert np.abs(shown(path).astype(int) - (255, 0, 0)).max() <= 6  # lossy formats


def test_content_counts_not_the_name(tmp_path):
    path = tmp_path / "0123abcd"  # a blob of a cache
    Image.new("RGB", (4, 4), "red").save(path, "PNG")
    np.testing.assert_array_equal(shown(path), np.full((4, 4, 3), (255, 0, 0)))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "pointer of Git LFS"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "none of JPEG, PNG"),
        (b"<html>not found</html>", "none of JPEG, PNG"),
        (b"", "none of JPEG, PNG"),
    ],
)
def test_what_is_no_picture_says_so_and_starts_no_program(tmp_path, content, told):
    path = tmp_path / "x.jpg"
    path.write_bytes(content)
    assert told in damage(path)
    with pytest.raises(DataError, match=told):
        load_rgb(path)
