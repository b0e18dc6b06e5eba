"""Pictures as a viewer shows them: which files are read, and how each becomes RGB.

16-bit grey keeps its high byte, as Pillow does with 16-bit colour. What is transparent lies on white. The orientation
that a camera noted is applied. Of an animated picture the first frame is taken, of a file with several pages the first.
Colour profiles are not applied, as in the published evaluations. Grey in 32 bits, integer or float, has no agreed
black and white and is refused, and so are colour spaces without a plain conversion.
"""

import struct
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from lit_clipq.errors import DataError

DECODING = 2
"""Number of this way to decode; results that are remembered depend on it."""
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000")
"""What is decoded, whatever a file is called. Pillow knows others, some of which start programs."""
DECODE_ERRORS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
_PLAIN_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "La", "CMYK", "YCbCr"})
_GREY_16_MODES = frozenset({"I;16", "I;16L", "I;16B", "I;16N"})
_ORIENTATION = 0x0112  # EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_LFS_POINTER = b"version https://git-lfs"


@cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this installation of Pillow decodes."""
    Image.init()
    return tuple(kind for kind in FORMATS if kind in Image.OPEN)


@cache
def picture_suffixes() -> frozenset[str]:
    """Return the suffixes, lower case, of the formats that this installation of Pillow decodes."""
    kinds = (*_formats(), "MPO")  # several JPEGs in one file, of which the first is decoded
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in kinds)


def load_rgb(path: str | Path) -> Image.Image:
    """Decode a whole picture as RGB, as a viewer shows it.

    Raises:
        DataError: The file is missing, truncated, no picture, or one whose pixels have no plain conversion.
    """
    try:
        with Image.open(path, formats=_formats()) as picture:
            reason = _no_conversion(picture)
            if reason is None:
                picture.load()  # which turns a TIFF and forgets its orientation
                orientation = _orientation(picture)
                plain = _to_rgb(picture)
                return plain.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else plain
    except FileNotFoundError:
        reason = absence(Path(path))
    except DECODE_ERRORS as error:
        reason = _damage_told(Path(path), error)
    raise DataError(f"Picture {path} {reason}; replace the file.")


def damage(path: Path) -> str | None:
    """Say what keeps a picture from being read, or None. JPEGs are decoded at 1/8 of their size, reading every byte."""
    try:
        with Image.open(path, formats=_formats()) as picture:
            reason = _no_conversion(picture)
            if reason is None:
                picture.draft("RGB", (1, 1))
                picture.load()
            return reason
    except FileNotFoundError:
        return absence(path)
    except DECODE_ERRORS as error:
        return _damage_told(path, error)


def _no_conversion(picture: Image.Image) -> str | None:
    """Say why pixels of this mode cannot be shown, or None."""
    mode = picture.mode
    if mode in _PLAIN_MODES or mode in _GREY_16_MODES or (mode == "I" and picture.format == "PPM"):
        return None
    kind = {"F": "32-bit float", "I": "32-bit integer"}.get(mode)
    if kind is not None:
        return f"has {kind} pixels, and no file says which value is white (mode {mode}); convert it to 8 or 16 bits"
    return f"has pixels in the colour space {mode}; convert it to RGB"


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode in _GREY_16_MODES or picture.mode == "I":
        return _grey_16_to_rgb(picture)
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    coloured = picture.convert("LA").convert("RGBA") if picture.mode == "La" else picture.convert("RGBA")
    canvas = Image.new("RGBA", coloured.size, "white")
    return Image.alpha_composite(canvas, coloured).convert("RGB")


def _grey_16_to_rgb(picture: Image.Image) -> Image.Image:
    values = np.asarray(picture)
    grey = (values >> 8).astype(np.uint8)
    transparent = picture.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


def _orientation(picture: Image.Image) -> int:
    """Return EXIF's orientation, 1 where there is none or none that can be read."""
    try:
        found = picture.getexif().get(_ORIENTATION, 1)
    except (*DECODE_ERRORS, struct.error, KeyError, TypeError):
        return 1  # a damaged note about a picture is no damage of the picture
    return found if isinstance(found, int) else 1


def absence(path: Path) -> str:
    """Say of a file that is not there what is missing."""
    if path.is_symlink():
        return f"is a link to {path.readlink()}, which is missing; fetch it (dvc pull, git annex get) or link it anew"
    return "is missing"


def _damage_told(path: Path, error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        with path.open("rb") as file:
            start = file.read(len(_LFS_POINTER))
        if start == _LFS_POINTER:
            return "cannot be decoded (it is a pointer of Git LFS; fetch the file with git lfs pull)"
        return f"cannot be decoded (it is none of {', '.join(_formats())}, or its beginning is damaged)"
    return f"cannot be decoded ({error})"
