"""Pixels of a scene, in integer arithmetic from beginning to end."""

from functools import lru_cache

import numpy as np

from lit_clipq.mini.rng import Rng
from lit_clipq.mini.scene import CANVAS, COLOURS, Scene, Thing
from lit_clipq.mini.shapes import EDGE, INSIDE, mask

IMAGE_SIZE = CANVAS // 2
"""Side of a picture in pixels."""

_BASE: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "grass": ((104, 150, 70), (86, 130, 58)),
    "sand": ((222, 200, 148), (206, 182, 128)),
    "water": ((88, 150, 196), (120, 180, 216)),
    "snow": ((226, 232, 240), (208, 216, 230)),
    "night": ((24, 26, 62), (228, 228, 200)),
    "bricks": ((158, 84, 68), (196, 186, 176)),
    "wood": ((164, 118, 74), (134, 92, 56)),
    "tiles": ((186, 186, 190), (140, 142, 150)),
}


@lru_cache(maxsize=64)
def _pattern(background: str, phase: int) -> np.ndarray:
    """Return where the second colour of a background lies: bool `(CANVAS, CANVAS)`."""
    y, x = np.mgrid[phase * 5 : phase * 5 + CANVAS, phase * 7 : phase * 7 + CANVAS]
    if background == "grass":
        return (x * 7 + y * 3) % 11 < 3
    if background == "sand":
        return (x * x + 3 * x * y + 7 * y) % 13 < 3
    if background == "water":
        return (y + np.abs(x % 24 - 12) // 2) % 16 < 4
    if background == "snow":
        return (x % 18 - 9) ** 2 + ((y + 9 * (x // 18 % 2)) % 18 - 9) ** 2 <= 8
    if background == "night":
        return (x * 31 + y * 57 + (x // 8) * (y // 8) * 13) % 211 < 3
    if background == "bricks":
        return (y % 16 < 2) | ((x + 14 * (y // 16 % 2)) % 28 < 2)
    if background == "wood":
        return (y + (x // 16 % 3)) % 14 < 3
    return (x // 16 + y // 16) % 2 == 0


def _textured(thing: Thing, size: int) -> np.ndarray:
    """Return where the second colour of a thing lies: bool `(size, size)`."""
    period = max(6, thing.radius // 2)
    y, x = np.mgrid[0:size, 0:size]
    if thing.texture == "striped":
        return (x + y) % period < period // 2
    if thing.texture == "dotted":
        return (x % period - period // 2) ** 2 + (y % period - period // 2) ** 2 <= (period * 3 // 10) ** 2
    if thing.texture == "checkered":
        return (x // (period // 2) + y // (period // 2)) % 2 == 0
    return np.zeros((size, size), dtype=bool)


def _paint(canvas: np.ndarray, thing: Thing, rng: Rng) -> None:
    codes = mask(thing.shape, thing.radius, thing.tilt, thing.flip)
    size = codes.shape[0]
    first = np.array([min(255, max(0, c + rng.between(-18, 18))) for c in COLOURS[thing.colour]], dtype=np.int32)
    second = (first + 255) // 2 if int(first.sum()) < 480 else first // 2
    top, left = thing.y - size // 2, thing.x - size // 2
    rows = slice(max(0, top), min(CANVAS, top + size))
    columns = slice(max(0, left), min(CANVAS, left + size))
    inner = (slice(rows.start - top, rows.stop - top), slice(columns.start - left, columns.stop - left))
    window = canvas[rows, columns]
    codes = codes[inner]
    window[codes == INSIDE] = first
    if thing.texture != "plain":
        window[(codes == INSIDE) & _textured(thing, size)[inner]] = second
    window[codes == EDGE] = first // 2


def render(scene: Scene, rng: Rng) -> np.ndarray:
    """Draw a scene.

    Args:
        scene: what to draw.
        rng: decides light, shades and noise.

    Returns:
        The picture, uint8 `(IMAGE_SIZE, IMAGE_SIZE, 3)`, RGB.
    """
    colours = np.array(_BASE[scene.background], dtype=np.int32)
    colours = colours + rng.between(-14, 14)
    canvas = colours[_pattern(scene.background, rng.below(8)).astype(np.intp)]
    for thing in reversed(scene.things):
        _paint(canvas, thing, rng)
    canvas = canvas.reshape(IMAGE_SIZE, 2, IMAGE_SIZE, 2, 3).sum(axis=(1, 3)) // 4
    light = rng.between(205, 270)
    noise = rng.byte_array(IMAGE_SIZE * IMAGE_SIZE * 3).reshape(canvas.shape).astype(np.int32) * 25 // 256 - 12
    return np.clip(canvas * light // 256 + noise, 0, 255).astype(np.uint8)
