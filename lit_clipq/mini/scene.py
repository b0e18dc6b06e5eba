"""What is in a picture of the mini world: things with their properties, and how a scene is drawn at random."""

from dataclasses import dataclass

from lit_clipq.mini.rng import Rng
from lit_clipq.mini.shapes import FLIPPED, SHAPES, TILTS

CANVAS = 128
"""Side of the drawing in sub-pixels; the picture has half as many pixels."""
CELL = 16
"""Pitch in sub-pixels of the grid of centres; a small transformer learns shapes much faster on a grid."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (208, 36, 40),
    "orange": (244, 134, 26),
    "yellow": (244, 220, 54),
    "green": (44, 160, 62),
    "blue": (42, 84, 210),
    "purple": (132, 52, 176),
    "pink": (244, 132, 184),
    "brown": (126, 78, 42),
    "white": (240, 240, 240),
    "black": (36, 36, 40),
}
TEXTURES = ("plain", "striped", "dotted", "checkered")
RADII: dict[str, int] = {"small": 12, "medium": 18, "large": 28}
"""Sizes by name, in sub-pixels."""
BACKGROUNDS = ("grass", "sand", "water", "snow", "night", "bricks", "wood", "tiles")


@dataclass(frozen=True)
class Thing:
    """One object; positions and radius are in sub-pixels."""

    shape: str
    colour: str
    texture: str
    size: str
    radius: int
    x: int
    y: int
    tilt: int
    flip: bool


@dataclass(frozen=True)
class Scene:
    """A background and its things, the largest first."""

    background: str
    things: tuple[Thing, ...]


def left_of(a: Thing, b: Thing) -> bool:
    """Say whether a is clearly to the left of b: further apart sideways than up and down."""
    return b.x - a.x >= 16 and b.x - a.x > abs(b.y - a.y)


def above(a: Thing, b: Thing) -> bool:
    """Say whether a is clearly above b."""
    return b.y - a.y >= 16 and b.y - a.y > abs(b.x - a.x)


def _place(rng: Rng, radius: int, placed: list[Thing]) -> tuple[int, int] | None:
    """Find a free centre for a thing, or None where sixty tries found none."""
    margin = -(-(radius + 2) // CELL)
    for _ in range(60):
        x, y = (CELL * rng.between(margin, CANVAS // CELL - margin) for _ in range(2))
        if all((x - t.x) ** 2 + (y - t.y) ** 2 >= (radius + t.radius) ** 2 for t in placed):
            return x, y
    return None


def _thing(rng: Rng, shape: str, colour: str, size: str, placed: list[Thing]) -> Thing | None:
    radius = RADII[size]
    centre = _place(rng, radius, placed)
    if centre is None:
        return None
    return Thing(
        shape=shape,
        colour=colour,
        texture=rng.weighted(TEXTURES, (70, 10, 10, 10)),
        size=size,
        radius=radius,
        x=centre[0],
        y=centre[1],
        tilt=rng.below(len(TILTS)) if rng.percent(25) else 0,
        flip=shape in FLIPPED and rng.percent(50),
    )


def _finish(background: str, placed: list[Thing]) -> Scene:
    return Scene(background, tuple(sorted(placed, key=lambda t: -t.radius)))


def crowd(rng: Rng) -> Scene:
    """Draw a scene of two to four things; now and then two of them are of the same kind."""
    background = rng.choice(BACKGROUNDS)
    placed: list[Thing] = []
    for _ in range(rng.weighted((2, 3, 4), (35, 40, 25))):
        size = rng.weighted(("small", "medium", "large"), (30, 45, 25))
        if any(t.size == "large" for t in placed) and size == "large":
            size = "medium"
        if placed and rng.percent(15):
            shape, colour = placed[-1].shape, placed[-1].colour
        else:
            shape, colour = rng.choice(tuple(SHAPES)), rng.choice(tuple(COLOURS))
        thing = _thing(rng, shape, colour, size, placed)
        if thing is not None:
            placed.append(thing)
    return _finish(background, placed)


def portrait(rng: Rng, shape: str | None = None) -> Scene:
    """Draw a scene with one main thing and up to three smaller ones of other shapes around it."""
    background = rng.choice(BACKGROUNDS)
    shape = shape or rng.choice(tuple(SHAPES))
    main = _thing(rng, shape, rng.choice(tuple(COLOURS)), rng.weighted(("medium", "large"), (40, 60)), [])
    if main is None:
        raise AssertionError("an empty canvas has room for one thing")
    placed = [main]
    others = [name for name in SHAPES if name != shape]
    for _ in range(rng.weighted((0, 1, 2, 3), (25, 30, 25, 20))):
        thing = _thing(rng, rng.choice(others), rng.choice(tuple(COLOURS)), "small", placed)
        if thing is not None:
            placed.append(thing)
    return _finish(background, placed)
