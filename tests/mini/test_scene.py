"""The drawn world: random numbers, shapes, scenes, pixels."""

import math
from fractions import Fraction

import numpy as np
import pytest

from lit_clipq.mini.render import IMAGE_SIZE, render
from lit_clipq.mini.rng import Rng
from lit_clipq.mini.scene import CANVAS, CELL, COLOURS, Scene, Thing, above, crowd, left_of, portrait
from lit_clipq.mini.shapes import EDGE, INSIDE, SHAPES, TILTS, Ellipse, Polygon, mask


def thing(shape="circle", colour="red", x=64, y=64, radius=18, texture="plain"):
    return Thing(shape, colour, texture, "medium", radius, x, y, 0, False)


def test_numbers_are_those_of_splitmix64():
    rng = Rng()
    rng._key = 1234567  # the published test vector of the generator
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [rng.below(1 << 64) for _ in expected] == expected


def test_byte_array_continues_the_stream_of_single_numbers():
    one, many = Rng("a", 1), Rng("a", 1)
    assert one.below(7) == many.below(7)
    words = [one.below(1 << 64).to_bytes(8, "little") for _ in range(3)]
    assert many.byte_array(20).tobytes() == b"".join(words)[:20]
    assert one.below(1 << 64) == many.below(1 << 64)


def test_streams_with_other_keys_differ_and_draws_are_even():
    rng, other = Rng(0, "a"), Rng(0, "b")
    draws = [rng.below(10) for _ in range(10_000)]
    assert draws[:20] != [other.below(10) for _ in range(20)]
    counts = np.bincount(draws, minlength=10)
    assert (np.abs(counts - 1000) < 5 * math.sqrt(900)).all()


def test_sample_and_weighted_respect_their_arguments():
    rng = Rng(3)
    for _ in range(50):
        assert len(set(rng.sample(range(6), 4))) == 4
        assert rng.weighted("abc", (0, 1, 0)) == "b"


def inside(shape: str, x: Fraction, y: Fraction) -> bool:
    """Decide a point with exact rational arithmetic, by counting crossings of a ray to the left."""
    result = False
    for step in SHAPES[shape]:
        if isinstance(step, Ellipse):
            hit = ((x - step.x) / step.rx) ** 2 + ((y - step.y) / step.ry) ** 2 <= 1
        else:
            assert isinstance(step, Polygon)
            edges = zip(step.points, step.points[1:] + step.points[:1], strict=True)
            crossings = 0
            for (x1, y1), (x2, y2) in edges:
                if (y1 > y) != (y2 > y):
                    crossings += x1 + (y - y1) * Fraction(x2 - x1, y2 - y1) > x
            hit = crossings % 2 == 1
        result = (result and not hit) if step.cut else (result or hit)
    return result


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_mask_agrees_with_exact_geometry(shape):
    radius = 12
    codes = mask(shape, radius)
    half = codes.shape[0] // 2
    for row in range(codes.shape[0]):
        for column in range(codes.shape[1]):
            x, y = (Fraction((2 * i + 1 - 2 * half) * 1000 // (2 * radius)) for i in (column, row))
            assert bool(codes[row, column]) == inside(shape, x, y), (row, column)


def test_edge_is_the_outermost_ring_of_pixels():
    codes = mask("square", 16)
    rows, columns = np.nonzero(codes)
    box = codes[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    assert (box[1:-1, 1:-1] == INSIDE).all()
    border = np.concatenate([box[0], box[-1], box[:, 0], box[:, -1]])
    assert (border == EDGE).all()


def test_flip_mirrors_and_tilts_are_rotations():
    assert np.array_equal(mask("boat", 14, 0, True)[:, ::-1] > 0, mask("boat", 14) > 0)
    for cosine, sine in TILTS:
        assert abs(cosine**2 + sine**2 - 4096**2) < 2 * 4096


def test_masks_are_shared_and_cannot_be_changed():
    with pytest.raises(ValueError, match="read-only"):
        mask("star", 12)[0, 0] = 1


def test_relations_are_exclusive_and_antisymmetric():
    a, b = thing(x=30, y=60), thing(x=90, y=70)
    assert left_of(a, b)
    assert not left_of(b, a)
    assert not above(a, b)
    assert above(thing(y=20), thing(y=60))


@pytest.mark.parametrize("index", range(60))
def test_scenes_hold_separate_things_inside_the_canvas(index):
    for scene in (crowd(Rng("scene", index)), portrait(Rng("scene", index))):
        assert 1 <= len(scene.things) <= 4
        for i, a in enumerate(scene.things):
            assert a.radius < min(a.x, a.y, CANVAS - a.x, CANVAS - a.y)
            assert a.x % CELL == a.y % CELL == 0
            for b in scene.things[:i]:
                assert math.hypot(a.x - b.x, a.y - b.y) >= a.radius + b.radius
        radii = [t.radius for t in scene.things]
        assert radii == sorted(radii, reverse=True)


def test_main_thing_of_a_portrait_is_the_only_one_of_its_shape_and_the_largest():
    for index in range(50):
        scene = portrait(Rng(index), "star")
        assert scene.things[0].shape == "star"
        assert all(t.shape != "star" and t.radius < scene.things[0].radius for t in scene.things[1:])


def test_picture_shows_the_colour_where_the_thing_is():
    for colour, rgb in COLOURS.items():
        pixels = render(Scene("sand", (thing("circle", colour),)), Rng(colour)).astype(int)
        assert pixels.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
        middle = pixels[28:36, 28:36].mean(axis=(0, 1))
        nearest = min(COLOURS, key=lambda c: float(((np.array(COLOURS[c]) - middle) ** 2).sum()))
        assert nearest == colour, (rgb, middle)


def test_rendering_is_a_function_of_scene_and_stream():
    scene = crowd(Rng(5))
    assert np.array_equal(render(scene, Rng(6)), render(scene, Rng(6)))
    assert not np.array_equal(render(scene, Rng(6)), render(scene, Rng(7)))
