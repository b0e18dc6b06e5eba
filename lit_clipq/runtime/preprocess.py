"""Pictures to input, as open_clip's transform does it for evaluation, with Pillow and numpy alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from lit_clipq.errors import ModelError

_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
RESIZE_MODES = ("shortest", "longest", "squash")
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class ImageTransform:
    """Resize, crop, scale to [0, 1], normalise; equal bit for bit to open_clip's inference transform.

    Raises:
        ModelError: For a filter or a way of resizing that is not known.
    """

    size: tuple[int, int]
    """Height and width in pixels."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    """`bicubic` or `bilinear`."""
    resize_mode: str = "shortest"
    """As in `PreprocessingOptions`."""
    fill_color: int = 0
    """Of what lies outside the picture where the longest side fits."""

    def __post_init__(self) -> None:
        if self.interpolation not in _FILTERS or self.resize_mode not in RESIZE_MODES:
            raise ModelError(
                f"expected interpolation {' or '.join(_FILTERS)} and resize mode {', '.join(RESIZE_MODES)}, got "
                f"{self.interpolation!r} and {self.resize_mode!r}; quantize the model with other preprocessing options"
            )

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "ImageTransform":
        """Undo `vars`, lists as tuples."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}
        return cls(**values)

    def __call__(self, picture: Image.Image) -> Array:
        """Return a picture as float32 (3, H, W)."""
        fitted = self._fit(picture).convert("RGB")
        pixels = np.asarray(fitted, dtype=np.uint8).transpose(2, 0, 1).astype(np.float32) / np.float32(255)
        mean, std = (np.array(v, dtype=np.float32)[:, None, None] for v in (self.mean, self.std))
        return (pixels - mean) / std  # type: ignore[no-any-return]

    def _fit(self, picture: Image.Image) -> Image.Image:
        height, width = self.size
        if self.resize_mode == "squash":
            return self._resized(picture, height, width)
        if self.resize_mode == "longest":
            ratio = max(picture.height / height, picture.width / width)
            scaled = self._resized(picture, round(picture.height / ratio), round(picture.width / ratio))
            return _centre(scaled, height, width, self.fill_color)
        if height == width:
            short, long = sorted(picture.size)
            other = int(height * long / short)
            tall = picture.height >= picture.width
            scaled = self._resized(picture, other if tall else height, height if tall else other)
        else:  # open_clip resizes to another shape than a square by bicubic interpolation, whatever it is told
            ratio = min(picture.height / height, picture.width / width)
            shape = round(picture.width / ratio), round(picture.height / ratio)
            scaled = picture if picture.size == shape else picture.resize(shape, Image.Resampling.BICUBIC)
        return _centre(scaled, height, width, 0)

    def _resized(self, picture: Image.Image, height: int, width: int) -> Image.Image:
        if picture.size == (width, height):
            return picture
        return picture.resize((width, height), _FILTERS[self.interpolation])


def _centre(picture: Image.Image, height: int, width: int, fill: int) -> Image.Image:
    """Cut out the middle, after padding what is too small."""
    down, across = max(height - picture.height, 0), max(width - picture.width, 0)
    if down or across:
        border = (across // 2, down // 2, (across + 1) // 2, (down + 1) // 2)
        colour: Any = fill if len(picture.getbands()) == 1 else (fill,) * len(picture.getbands())
        picture = ImageOps.expand(picture, border, fill=colour)
    top, left = round((picture.height - height) / 2.0), round((picture.width - width) / 2.0)
    return picture.crop((left, top, left + width, top + height))
