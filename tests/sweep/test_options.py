"""The grid of a sweep."""

import pytest

from lit_clipq.errors import ConfigError
from lit_clipq.sweep import SweepOptions, grid_of
from lit_clipq.sweep.options import shard_of

SEED = [32, 16, 8, 4, 2]


def test_the_grid_of_the_seed_has_25_points_a_seed_and_method():
    options = SweepOptions(recipes=["vanilla", "ptq4clip"], seeds=[0, 1, 2], vision_bits=SEED, text_bits=SEED)
    points = grid_of(options)
    assert len(points) == 2 * 3 * 25
    assert len({repr(point) for point in points}) == len(points)
    assert [point.options["text_bits"] for point in points[:6]] == [32, 16, 8, 4, 2, 32]
    assert {point.group for point in points[:25]} == {("vanilla", 0)}


def test_without_axes_there_is_the_point_that_the_other_options_say():
    assert [dict(point.options) for point in grid_of(SweepOptions())] == [{}]


def test_widths_of_weights_and_activations_in_one_word():
    (point,) = grid_of(SweepOptions(bits=["w4a8"], stages={"mine": ["grids", "ranges"]}))
    assert point.options == {"weight_bits": 4, "activation_bits": 8, "stages": ["grids", "ranges"], "recipe": None}


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 30])
def test_shards_are_the_grid(parts):
    points = grid_of(SweepOptions(vision_bits=SEED, text_bits=SEED))
    assert [point for i in range(parts) for point in shard_of(points, i + 1, parts)] == points


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"bits": []}, "sweep.bits is empty, so the grid has no point"),
        ({"recipes": []}, "sweep.recipes is empty"),
        ({"stages": {}}, "sweep.stages is empty"),
        ({"vision_bits": [8, 8]}, "sweep.vision_bits lists a value twice"),
        ({"bits": ["w4"]}, "sweep.bits must list numbers of bits or such as w4a8, got 'w4'"),
        ({"weight_bits": ["w4a8"]}, "sweep.weight_bits must list numbers of bits, got 'w4a8'"),
        ({"bits": [True]}, "sweep.bits must list numbers"),
        ({"shard": "0/4"}, "sweep.shard must be i/n"),
        ({"shard": "5/4"}, "sweep.shard must be i/n"),
        ({"shard": "a"}, "sweep.shard must be i/n"),
        ({"workers": 0}, "sweep.workers must be at least 1, got 0"),
        ({"retries": -1}, "sweep.retries must be at least 0"),
        ({"recipes": ["a"], "stages": {"a": ["grids"]}}, "calls a method 'a' as sweep.recipes does"),
    ],
)
def test_what_spans_no_grid_is_refused_in_one_sentence(options, told):
    with pytest.raises(ConfigError, match=told) as caught:
        grid_of(SweepOptions(**options))
    assert "\n" not in str(caught.value)
