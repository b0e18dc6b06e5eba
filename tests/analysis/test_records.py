"""Lines of results.jsonl."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from lit_clipq.analysis.comparison import Interval
from lit_clipq.analysis.records import (
    FORMAT,
    Identity,
    PointRecord,
    baseline_of,
    compare,
    read_records,
    scores_of,
)
from lit_clipq.errors import ConfigError, DataError
from lit_clipq.metrics import paired_bootstrap

WIDTHS = {f"{tower}_{operand}": 4 for tower in ("vision", "text", "other") for operand in ("weight", "activation")}


def point(name: str, seed: int = 0, **changes) -> PointRecord:
    draw = np.random.default_rng(seed)
    clusters = np.repeat(np.arange(40), 5)
    scores = {
        "recall@1_t2i": (draw.integers(0, 2, 200).astype(float), clusters),
        "recall@1_i2t": (draw.choice([0, 1 / 3, 1], 40), np.arange(40)),
        "cider": (draw.random(300), np.random.default_rng(9).permutation(300)),
    }
    record = PointRecord(
        id=name,
        kind="point",
        identity=Identity("c", "m", "d", "s"),
        task="Retrieval",
        model="mini-vit",
        pretrained="mini",
        method="ptq4clip",
        widths=WIDTHS,
        widths_in_words="W4A4",
        seed=seed,
        calibration_samples=32,
        quantize={"name": "ptq4clip"},
        metrics={"recall@1_t2i": 0.1 + 0.2},
        differences={"recall@1_t2i": Interval(-0.1, -0.2, 0.0)},
        scores=scores_of(scores),
    )
    return replace(record, **changes)


def test_a_line_gives_back_every_value_to_the_bit():
    record = point("a", 3)
    line = record.to_line()
    assert "\n" not in line
    assert json.loads(line)["format"] == FORMAT
    read = PointRecord.from_line(line)
    assert replace(read, scores={}) == replace(record, scores={})
    assert read.scores.keys() == record.scores.keys()
    for name, scores in record.scores.items():
        assert np.array_equal(read.scores[name].values, scores.values)
        assert np.array_equal(read.scores[name].clusters, scores.clusters)


def test_hits_of_25_000_captions_take_a_few_kilobytes():
    hits = np.random.default_rng(0).integers(0, 2, 25_000).astype(float)
    line = replace(point("a"), scores=scores_of({"r": (hits, np.repeat(np.arange(5_000), 5))})).to_line()
    assert len(line) < 8_000


def test_the_last_line_of_a_point_counts_and_a_torn_one_does_not(tmp_path, caplog):
    path = tmp_path / "results.jsonl"
    failed = replace(point("a"), error="no memory", metrics={}, scores={})
    lines = [failed.to_line(), point("b").to_line(), point("a").to_line()]
    path.write_text("\n".join([*lines, point("c").to_line()[:100]]))
    found = read_records(path)
    assert [(record.id, record.error) for record in found] == [("a", None), ("b", None)]
    assert "cut short" in caplog.text


def test_shards_are_read_together(tmp_path):
    paths = [tmp_path / name for name in ("one", "two")]
    for path in paths:
        path.write_text(point(path.name).to_line() + "\n")
    assert [record.id for record in read_records(*paths)] == ["one", "two"]


@pytest.mark.parametrize("line", ["{}", "[1]", "{", '{"format": 99}', '{"format": 1, "id": "a"}', "\xff"])
def test_a_damaged_line_is_named(tmp_path, line):
    path = tmp_path / "results.jsonl"
    path.write_bytes(point("a").to_line().encode() + b"\n" + line.encode("latin-1") + b"\n")
    with pytest.raises(DataError, match="line 2: expected a point of a sweep"):
        read_records(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"id": []},
        {"identity": {"code": 1, "model": "m", "data": "d", "settings": "s"}},
        {"kind": "other"},
        {"metrics": {"recall@1_t2i": "high"}},
        {"metrics": 5},
        {"widths": {"vision_weight": None}},
        {"differences": {"cider": {"value": "0", "low": 0, "high": 0}}},
        {"scores": {"clusters": [], "metrics": {"cider": {"clusters": 0, "values": ""}}}},
        {"seed": "0"},
        {"error": 5},
    ],
)
def test_a_line_that_was_edited_to_values_of_another_type_is_named(changes, tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text(f"{point('a').to_line()}\n{json.dumps(json.loads(point('b').to_line()) | changes)}\n")
    with pytest.raises(DataError, match="line 2: expected a point of a sweep"):
        read_records(path)


def test_a_line_that_is_nested_without_end_is_named(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text("[" * 100_000 + "\n")
    with pytest.raises(DataError, match=r"line 1: .*nested too deeply"):
        read_records(path)


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(DataError, match="absent"):
        read_records(tmp_path / "absent")


def test_two_points_are_compared_as_the_bootstrap_does():
    one, other = point("a", 1), point("b", 2)
    interval = compare(one, other)["recall@1_t2i"]
    before, after = (torch.from_numpy(p.scores["recall@1_t2i"].values) for p in (one, other))
    expected = paired_bootstrap(before, after, torch.arange(40).repeat_interleave(5))
    assert (interval.value, interval.low, interval.high) == tuple(expected)


def test_points_of_other_samples_are_not_compared():
    with pytest.raises(ConfigError, match="different samples of cider"):
        compare(point("a", 1), point("b", 2, scores=scores_of({"cider": ([0.0], [7])})))


def test_the_baseline_is_that_of_the_same_model_and_data():
    record, other = point("a"), Identity("c", "m", "other", "s")
    floats = [point("f", kind="float", identity=other), point("g", kind="float")]
    assert baseline_of(record, floats) is floats[1]
    assert baseline_of(record, floats[:1]) is None
    assert record.identity.differing(other) == ["data"]
