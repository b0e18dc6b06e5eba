"""Outlines of the things in the mini world, drawn with integers only so that every machine draws the same pixels.

A shape is a list of steps (`add` or `cut` a polygon or an ellipse) in a square of -1000 .. 1000, y pointing down.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

INSIDE = 1
EDGE = 2

# cosine and sine times 4096, rounded; written out because a libm may round them otherwise
TILTS: tuple[tuple[int, int], ...] = (
    (4096, 0),
    (4056, 570),
    (4056, -570),
    (3937, 1129),
    (3937, -1129),
)


@dataclass(frozen=True)
class Polygon:
    """A closed polygon, filled by the even-odd rule."""

    points: tuple[tuple[int, int], ...]
    cut: bool = False


@dataclass(frozen=True)
class Ellipse:
    """An ellipse with axes along x and y."""

    x: int
    y: int
    rx: int
    ry: int
    cut: bool = False


Step = Polygon | Ellipse


def _box(x0: int, y0: int, x1: int, y1: int, cut: bool = False) -> Polygon:
    return Polygon(((x0, y0), (x1, y0), (x1, y1), (x0, y1)), cut)


SHAPES: dict[str, tuple[Step, ...]] = {
    "circle": (Ellipse(0, 0, 950, 950),),
    "square": (_box(-820, -820, 820, 820),),
    "triangle": (Polygon(((0, -950), (980, 830), (-980, 830))),),
    "diamond": (Polygon(((0, -1000), (720, 0), (0, 1000), (-720, 0))),),
    "hexagon": (Polygon(((-500, -866), (500, -866), (1000, 0), (500, 866), (-500, 866), (-1000, 0))),),
    "star": (
        Polygon(
            (
                (0, -1000),
                (235, -324),
                (951, -309),
                (380, 124),
                (588, 809),
                (0, 400),
                (-588, 809),
                (-380, 124),
                (-951, -309),
                (-235, -324),
            )
        ),
    ),
    "cross": (_box(-330, -950, 330, 950), _box(-950, -330, 950, 330)),
    "ring": (Ellipse(0, 0, 980, 980), Ellipse(0, 0, 520, 520, cut=True)),
    "heart": (
        Ellipse(-470, -330, 500, 500),
        Ellipse(470, -330, 500, 500),
        Polygon(((-930, -130), (0, -330), (930, -130), (0, 960))),
    ),
    "moon": (Ellipse(0, 0, 980, 980), Ellipse(480, -120, 820, 820, cut=True)),
    "arrow": (_box(-980, -240, 150, 240), Polygon(((100, -800), (1000, 0), (100, 800)))),
    "bolt": (Polygon(((200, -1000), (-620, 180), (-60, 180), (-260, 1000), (640, -240), (60, -240))),),
    "hourglass": (Polygon(((-780, -950), (780, -950), (130, 0), (780, 950), (-780, 950), (-130, 0))),),
    "cloud": (
        Ellipse(-480, 160, 500, 460),
        Ellipse(60, -160, 560, 560),
        Ellipse(540, 200, 450, 420),
        _box(-480, 200, 540, 620),
    ),
    "house": (
        _box(-700, -100, 700, 920),
        Polygon(((0, -980), (980, -60), (-980, -60))),
        _box(-180, 320, 180, 920, True),
    ),
    "tree": (
        Polygon(((0, -1000), (560, -300), (-560, -300))),
        Polygon(((0, -650), (800, 480), (-800, 480))),
        _box(-180, 480, 180, 980),
    ),
    "fish": (
        Ellipse(-200, 0, 780, 520),
        Polygon(((350, 0), (980, -560), (980, 560))),
        Ellipse(-560, -120, 120, 120, True),
    ),
    "flower": (
        Ellipse(0, -580, 400, 400),
        Ellipse(552, -179, 400, 400),
        Ellipse(341, 469, 400, 400),
        Ellipse(-341, 469, 400, 400),
        Ellipse(-552, -179, 400, 400),
        Ellipse(0, 0, 220, 220, cut=True),
    ),
    "mushroom": (Ellipse(0, -60, 980, 820), _box(-1000, -60, 1000, 1000, True), _box(-300, -60, 300, 900)),
    "key": (
        Ellipse(-560, 0, 430, 430),
        Ellipse(-560, 0, 180, 180, cut=True),
        _box(-180, -130, 980, 130),
        _box(420, 0, 600, 480),
        _box(760, 0, 960, 480),
    ),
    "cup": (
        Ellipse(520, -60, 470, 470),
        Ellipse(520, -60, 230, 230, cut=True),
        Polygon(((-850, -760), (560, -760), (400, 800), (-690, 800))),
    ),
    "boat": (
        Polygon(((-980, 320), (980, 320), (600, 880), (-600, 880))),
        Polygon(((40, -980), (760, 180), (40, 180))),
        Polygon(((-80, -760), (-80, 180), (-660, 180))),
    ),
    "umbrella": (
        Ellipse(0, -40, 980, 880),
        _box(-1000, -40, 1000, 1000, True),
        _box(-90, -60, 90, 860),
        _box(-420, 680, 90, 860),
    ),
    "car": (
        _box(-980, -60, 980, 460),
        Polygon(((-560, -60), (-320, -560), (420, -560), (680, -60))),
        Ellipse(-520, 500, 300, 300),
        Ellipse(520, 500, 300, 300),
        _box(-240, -420, 320, -140, True),
    ),
}
"""Every shape by name; the names are the classes of the classification set."""

FLIPPED = frozenset({"arrow", "moon", "fish", "key", "cup", "boat", "car", "bolt"})
"""Shapes that may be mirrored left to right."""


def _in_polygon(points: tuple[tuple[int, int], ...], x: np.ndarray, y: np.ndarray) -> np.ndarray:
    inside = np.zeros(np.broadcast_shapes(x.shape, y.shape), dtype=bool)
    for (x1, y1), (x2, y2) in zip(points, points[1:] + points[:1], strict=True):
        if y1 == y2:
            continue
        side = (x2 - x1) * (y - y1) - (x - x1) * (y2 - y1)
        inside ^= ((y1 > y) != (y2 > y)) & ((side > 0) if y2 > y1 else (side < 0))
    return inside


def _in_ellipse(step: Ellipse, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return ((x - step.x) * step.ry) ** 2 + ((y - step.y) * step.rx) ** 2 <= (step.rx * step.ry) ** 2


@lru_cache(maxsize=4096)
def mask(shape: str, radius: int, tilt: int = 0, flip: bool = False) -> np.ndarray:
    """Draw one shape.

    Args:
        shape: a name in `SHAPES`.
        radius: half the width in pixels.
        tilt: index into `TILTS`.
        flip: mirrored left to right.

    Returns:
        uint8 `(n, n)` with n = 2 * (radius + radius // 4 + 2): 0 outside, `INSIDE`, or `EDGE` on the outline.
        Shared between callers and therefore read-only.
    """
    half = radius + radius // 4 + 2
    axis = (2 * np.arange(2 * half, dtype=np.int64) + 1 - 2 * half) * 1000 // (2 * radius)  # pixel centres, thousandths
    cosine, sine = TILTS[tilt]
    x = (cosine * axis[None, :] + sine * axis[:, None]) // 4096
    y = (cosine * axis[:, None] - sine * axis[None, :]) // 4096
    x = -x if flip else x
    inside = np.zeros((2 * half, 2 * half), dtype=bool)
    for step in SHAPES[shape]:
        part = _in_polygon(step.points, x, y) if isinstance(step, Polygon) else _in_ellipse(step, x, y)
        inside = inside & ~part if step.cut else inside | part
    core = inside.copy()
    core[1:] &= inside[:-1]
    core[:-1] &= inside[1:]
    core[:, 1:] &= inside[:, :-1]
    core[:, :-1] &= inside[:, 1:]
    codes = np.where(core, INSIDE, np.where(inside, EDGE, 0)).astype(np.uint8)
    codes.flags.writeable = False
    return codes
