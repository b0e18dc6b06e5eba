import math

import pytest

from lit_clipq.report import read_points
from lit_clipq.report.series import (
    by_setting,
    cosine_curves,
    curves,
    depth,
    differences,
    heat_maps,
    layer_sqnr,
    main_metrics,
    mistakes,
    sizes,
    width_order,
)
from tests.report.samples import grid, line, write_lines, write_run

METRIC = "recall@1_i2t"


def points_of(path):
    return read_points([path]).points


def test_curves_are_means_over_seeds_with_the_lowest_and_the_highest_and_begin_at_float(tmp_path):
    found = {curve.varied: curve for curve in curves(points_of(write_lines(tmp_path, grid())), METRIC)}
    assert set(found) == {"both towers", "vision alone", "text alone"}
    assert found["vision alone"].widths == ("32", "8", "4")
    float_, eight, four = found["vision alone"].values
    assert (float_.mean, float_.seeds) == (0.7, 1)
    expected = [0.08 + 0.032 + 0.0001 * seed for seed in range(3)]
    assert eight.mean == pytest.approx(sum(expected) / 3, abs=1e-15)
    assert (eight.low, eight.high, eight.seeds) == (min(expected), max(expected), 3)
    assert four.mean == pytest.approx(0.04 + 0.032 + 0.0001)
    assert found["both towers"].values[2].mean == pytest.approx(0.04 + 0.004 + 0.0001)


def test_a_heat_map_has_the_cell_of_every_pair_of_widths(tmp_path):
    (heat,) = heat_maps(points_of(write_lines(tmp_path, grid())), METRIC)
    assert heat.vision == heat.text == ("32", "8", "4")
    for i, v in enumerate((32, 8, 4)):
        for j, t in enumerate((32, 8, 4)):
            expected = 0.7 if v == t == 32 else 0.01 * v + 0.001 * t + 0.0001
            assert heat.values[i][j].mean == pytest.approx(expected)


def test_a_missing_pair_of_widths_is_an_empty_cell(tmp_path):
    lines = [one for one in grid() if not one["id"].startswith("ptq4clip-8-4")]
    (heat,) = heat_maps(points_of(write_lines(tmp_path, lines)), METRIC)
    assert heat.values[1][2] is None
    assert sum(cell is None for row in heat.values for cell in row) == 1


def test_differences_of_several_seeds_are_their_mean_in_the_envelope_of_their_intervals(tmp_path):
    lines = [line("a", 4, 4, seed, value=0.5 + 0.05 * seed) for seed in range(2)]
    (row,) = differences(points_of(write_lines(tmp_path, lines)), METRIC)
    assert row.value == pytest.approx(-0.175)
    assert (row.low, row.high) == pytest.approx((0.5 - 0.72, 0.55 - 0.68))


def test_of_too_many_differences_those_of_equal_widths_are_kept(tmp_path):
    rows = differences(points_of(write_lines(tmp_path, grid((32, 8, 6, 4, 3, 2), seeds=1))), METRIC, most=10)
    assert [row.label for row in rows] == [f"ptq4clip {b}" for b in (8, 6, 4, 3, 2)]


def test_the_pareto_front_is_what_nothing_beats(tmp_path):
    lines = [line("a", b, b, value=v) for b, v in ((2, 0.1), (4, 0.5), (6, 0.4), (8, 0.6), (16, 0.6))]
    rows = sizes(points_of(write_lines(tmp_path, lines)), METRIC)
    beaten = {
        r.label for r in rows if any(s.megabytes <= r.megabytes and s.value >= r.value and s is not r for s in rows)
    }
    assert {row.label for row in rows if not row.best} == beaten == {"a 6", "a 16"}
    assert [row.megabytes for row in rows] == [200_000 * b / 1e6 for b in (2, 4, 6, 8, 16)]


def test_layers_keep_the_order_of_the_network(tmp_path):
    ((label, layers),) = layer_sqnr(points_of(write_run(tmp_path)))
    assert label == "ptq4clip 4"
    assert [value for _, value in layers] == [20.0, 21.0, 22.0]


def test_cosines_have_float_first_and_integrate_to_one(tmp_path):
    kind = {"pairs": 4, "float": {"mean": 0.1, "density": [0.5, 0.5]}, "quantized": {"mean": 0, "density": [0.0, 1.0]}}
    kind |= {"mean_shift": -0.1, "wasserstein": 0.1, "rank_correlation": None}
    points = points_of(write_run(tmp_path, cosine={"bins": 2, "matched": kind}))
    assert cosine_curves(points, "matched") == [("float", [0.5, 0.5]), ("ptq4clip 4", [0.0, 1.0])]
    assert cosine_curves(points, "unmatched") == []


def test_depth_takes_operands_in_order_of_the_network():
    from lit_clipq.report import Finding

    def row(layer, operand, predicted, scope="operand"):
        return {"scope": scope, "layer": layer, "tower": "vision", "operand": operand, "predicted": predicted}

    rows = [row("b.0", "all", 9, "block"), row("x", "weight", 1.0), row("x", "input", 2.0), row("y", "input", 3.0)]
    assert depth(Finding("f", "m", "r", "W4A4", rows)) == {
        "vision": {"weight": [(0, 1.0)], "input": [(0, 2.0), (1, 3.0)]}
    }


def test_settings_keep_different_n_apart(tmp_path):
    write_run(tmp_path, "a/results.json")
    write_run(tmp_path, "b/results.json", samples={"images": 100, "captions": 500})
    groups = by_setting(read_points([tmp_path]).points)
    assert sorted(len(members) for members in groups.values()) == [2, 2]


def test_mistakes_of_points_that_name_some(tmp_path):
    told = {"lost": 1, "won": 0, "pictures": 2, "rows": [{"file": "x.png", "own": "a", "float": "a", "quantized": "b"}]}
    assert mistakes(points_of(write_run(tmp_path, mistakes=told))) == [("ptq4clip 4", told)]


def test_main_metrics_are_the_known_ones_or_the_first(tmp_path):
    assert main_metrics(points_of(write_run(tmp_path))) == ["recall@1_i2t", "recall@1_t2i"]
    other = [line("a", 4, 4, metrics={"bleu": 0.1, "rouge": 0.2}, differences={})]
    assert main_metrics(points_of(write_lines(tmp_path, other))) == ["bleu"]


def test_widths_go_from_wide_to_narrow():
    order = sorted(["2", "W4A8", "32", "8", "W2A8", "16", "4"], key=width_order)
    assert order == ["32", "16", "8", "W4A8", "W2A8", "4", "2"]
    assert all(math.isfinite(width_order(width)[0]) for width in order)
