import json

import pytest

from lit_clipq.errors import DataError
from lit_clipq.report import read_points
from tests.report.samples import grid, line, run, write_lines, write_run


def test_a_run_is_a_float_and_a_quantized_point_with_its_own_numbers(tmp_path):
    found = read_points([write_run(tmp_path)]).points
    assert [point.method for point in found] == [None, "ptq4clip"]
    content = run()
    assert found[0].metrics == content["metrics"]["float"]
    assert found[1].metrics == content["metrics"]["quantized"]
    assert found[1].differences["recall@1_i2t"] == (-0.05, -0.05 - 0.02, -0.05 + 0.02)
    assert (found[0].bytes, found[1].bytes) == (7_130_000, 7_130_000 * 4 // 32)


@pytest.mark.parametrize("changes", [{"method": None}, {"bits": 32}])
def test_a_run_with_nothing_quantized_is_one_point(changes, tmp_path):
    found = read_points([write_run(tmp_path, **changes)]).points
    assert [point.method for point in found] == [None]


def test_points_of_a_sweep_know_the_float_metrics_of_their_own_data(tmp_path):
    other = {"code": "a", "model": "b", "data": "other", "settings": "d"}
    lines = [*grid(), line(None, 32, 32, value=0.1, id="f2", identity=other)]
    lines.append(line("ptq4clip", 4, 4, value=0.05, id="p2", identity=other))
    points = read_points([write_lines(tmp_path, lines)]).points
    assert {point.float_metrics["recall@1_i2t"] for point in points if point.data == "c"} == {0.7}
    assert {point.float_metrics["recall@1_i2t"] for point in points if point.data == "other"} == {0.1}
    assert len({point.setting for point in points}) == 2


def test_folders_are_searched_for_results_of_the_usual_names(tmp_path):
    write_run(tmp_path, "a/results.json")
    write_run(tmp_path, "b/results.json", bits=8)
    write_run(tmp_path, "b/other.json")
    (tmp_path / "captions_float.json").write_text("[]")
    assert len(read_points([tmp_path]).points) == 4


def test_a_file_given_twice_counts_once(tmp_path):
    path = write_run(tmp_path)
    assert len(read_points([path, tmp_path]).points) == 2


def test_a_last_line_that_is_cut_short_and_a_failed_point_are_told(tmp_path):
    lines = [*grid(), line("vanilla", 2, 2, error="no calibration data", metrics={})]
    read = read_points([write_lines(tmp_path, lines, end='{"format": 1, "ki')])
    assert len(read.points) == len(grid())
    assert any(f"line {len(lines) + 1}: cut short" in problem for problem in read.problems)
    assert any("vanilla" in problem and "no calibration data" in problem for problem in read.problems)


@pytest.mark.parametrize("bad", ["no JSON", "[1, 2]", '{"kind": "else", "id": "a"}', '{"kind": "point", "id": "a"}'])
def test_a_broken_line_is_refused_by_its_number(bad, tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(line(None, 32, 32)) + "\n" + bad + "\n")
    with pytest.raises(DataError, match=r"results\.jsonl, line 2 is not a result"):
        read_points([path])


@pytest.mark.parametrize("bad", ["", "no JSON", "[]", "{}", '{"metrics": {}, "size_bytes": {}}'])
def test_a_broken_file_is_refused_by_its_name(bad, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(bad)
    with pytest.raises(DataError, match=r"results\.json is not a result"):
        read_points([path])


def test_a_metric_that_is_no_number_is_refused(tmp_path):
    content = run()
    content["metrics"]["quantized"]["recall@1_i2t"] = float("nan")
    path = tmp_path / "results.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="recall@1_i2t: expected a finite number, got nan"):
        read_points([path])


def test_nothing_to_report_is_an_error(tmp_path):
    with pytest.raises(DataError, match="nothing to report"):
        read_points([tmp_path])
    with pytest.raises(DataError, match="nothing to report"):
        read_points([write_lines(tmp_path, [])])
    with pytest.raises(DataError, match="there is no file"):
        read_points([tmp_path / "absent"])


HISTOGRAM = {"mean": 0.3, "density": [0.0, 1.0, 0.0, 0.0]}
MOVED = {"float": HISTOGRAM, "quantized": HISTOGRAM, "pairs": 5, "mean_shift": 0.0, "wasserstein": 0.0}
ROW = {"file": "a.png", "own": "a", "float": "b", "quantized": "c"}


@pytest.mark.parametrize(
    "changes",
    [
        {"float_bytes": float("inf")},
        {"seed": 10**400},
        {"widths": {"vision_weight": 10**300}},
        {"metrics": {"recall@1_i2t": 10**400}},
        {"differences": {"recall@1_i2t": {"value": float("nan"), "low": 0, "high": 0}}},
        {"cosine": {"matched": None, "unmatched": {"quantized": HISTOGRAM}}},
        {"cosine": {"matched": MOVED}},
        {"cosine": {"matched": MOVED | {"rank_correlation": "high"}}},
        {"cosine": {"matched": {"float": HISTOGRAM | {"density": [0.0, 0.0]}}}},
        {"cosine": {"matched": {"float": {"mean": 0.3}}}},
        {"mistakes": {"rows": 5}},
        {"mistakes": {"rows": [{"file": "a.png"}]}},
        {"mistakes": {"rows": [ROW], "lost": "many"}},
        {"format": 2},
    ],
)
def test_values_of_another_type_are_refused_by_line_before_anything_is_drawn(changes, tmp_path):
    path = write_lines(tmp_path, [line(None, 32, 32), line("ptq4clip", 4, 4, **changes)])
    with pytest.raises(DataError, match="line 2 is not a result"):
        read_points([path])


@pytest.mark.parametrize(
    "changes", [{"predicted": None}, {"predicted": -1.0}, {"embedding": -1.0}, {"predicted": float("inf")}]
)
def test_squared_errors_that_are_none_are_refused(changes, tmp_path):
    row = {"scope": "operand", "layer": "a", "tower": "vision", "operand": "weight", "predicted": 0.1, **changes}
    path = tmp_path / "analysis.json"
    path.write_text(json.dumps({"model": "m", "recipe": "r", "sensitivity": [row]}))
    with pytest.raises(DataError, match=r"analysis\.json is not a result"):
        read_points([path])


def test_json_that_is_nested_without_end_is_refused(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("[" * 100_000)
    with pytest.raises(DataError, match="nested too deeply"):
        read_points([path])


def test_a_layer_without_noise_is_left_out_of_the_ratios(tmp_path):
    ratios = {"a": 20.0, "b": float("inf")}
    path = write_lines(tmp_path, [line(None, 32, 32), line("ptq4clip", 4, 4, sqnr_db=ratios)])
    assert read_points([path]).points[1].sqnr_db == {"a": 20.0}


def test_parts_of_a_sweep_in_a_folder_are_read_together(tmp_path):
    for part in (1, 2):
        lines = [line(None, 32, 32), line("ptq4clip", 4, 4, seed=part)]
        write_lines(tmp_path, lines, name=f"results.{part}-of-2.jsonl")
    assert [p.seed for p in read_points([tmp_path]).points if p.method] == [1, 2]
