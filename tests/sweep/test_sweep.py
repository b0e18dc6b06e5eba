"""`lightning sweep`, run as a user runs it, on a few pictures of the mini world."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lit_clipq.analysis.records import PointRecord, baseline_of, read_records
from lit_clipq.cli import main
from lit_clipq.sweep.runner import Runner

ROOT = Path(__file__).resolve().parents[2]
FEW = ["--data.limit", "40", "--quantize.calibration_samples", "8", "--trainer.accelerator", "cpu"]
VANILLA = ["--quantize.recipe", "vanilla"]


def sweep(path: Path, *options: str, config: str = "mini/retrieval", code: int = 0) -> list[PointRecord]:
    assert main(["sweep", "--config", config, *FEW, *options, "--results", str(path)]) == code
    return read_records(path)


def refused(capsys, path: Path, *options: str, config: str = "mini/retrieval") -> str:
    """Run, expect exit code 1 and one line; return it."""
    capsys.readouterr()
    assert main(["sweep", "--config", config, *FEW, *options, "--results", str(path)]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    return line


def validate(path: Path, *options: str, config: str = "mini/retrieval") -> dict:
    assert main(["validate", "--config", config, *FEW, *options, "--results", str(path)]) == 0
    return json.loads(path.read_text())


def same(record: PointRecord, results: dict) -> None:
    """Every number of a point is that of a `validate` run, to the bit."""
    assert record.metrics == results["metrics"]["quantized"]
    assert {name: vars(interval) for name, interval in record.differences.items()} == results["metrics"]["difference"]
    assert (record.float_bytes, record.quantized_bytes) == tuple(results["size_bytes"].values())
    assert record.float_macs_share == results["float_macs_share"]
    assert (record.samples, record.seed) == (results["samples"], results["seed"])
    if results["recipe"] is not None:  # else all widths are 32, and nothing was quantized
        assert record.widths == results["bits"]
        assert record.quantize == results["quantize"]
    assert record.calibration_samples == results["calibration_samples"]
    assert record.sqnr_db == {name: layer["sqnr_db"] for name, layer in results["layers"].items()}


AGREEMENT = "agreement"
"""A configuration of `Agreement` on the mini world; `ASYMMETRIC` is retrieval with one side quantized at a time."""
ASYMMETRIC = "asymmetric"


@pytest.fixture
def own_configs(tmp_path, monkeypatch):
    """Files of these names where the program is run."""
    folder = tmp_path / "configs"
    folder.mkdir()
    model = {"name": "mini-vit", "pretrained": "mini"}
    data = {"class_path": "datamodules.MiniRetrieval"}
    for name, task in ((AGREEMENT, ("Agreement", {})), (ASYMMETRIC, ("Retrieval", {"asymmetric": True}))):
        options = {"class_path": f"lit_clipq.tasks.{task[0]}", "init_args": model | task[1]}
        (folder / name).write_text(json.dumps({"model": options, "data": data, "trainer": {"logger": False}}))
    monkeypatch.chdir(folder)


GRID = ["--sweep.vision_bits", "[32,4]", "--sweep.text_bits", "[32,w3a8]"]
POINTS = [
    ["--quantize.vision_bits", "32", "--quantize.text_bits", "32"],
    ["--quantize.vision_bits", "32", "--quantize.text_weight_bits", "3", "--quantize.text_activation_bits", "8"],
    ["--quantize.vision_bits", "4", "--quantize.text_bits", "32"],
    ["--quantize.vision_bits", "4", "--quantize.text_weight_bits", "3", "--quantize.text_activation_bits", "8"],
]


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ("mini/retrieval", VANILLA),
        pytest.param("mini/retrieval_resnet", VANILLA, marks=pytest.mark.slow),
        pytest.param("mini/retrieval", ["--quantize.recipe", "ptq4clip"], marks=pytest.mark.slow),
        pytest.param(AGREEMENT, VANILLA, marks=pytest.mark.slow),
        pytest.param(ASYMMETRIC, VANILLA, marks=pytest.mark.slow),
        pytest.param("mini/classification", ["--quantize.recipe", "ptq4clip"], marks=pytest.mark.slow),
    ],
)
def test_every_point_has_the_numbers_of_validate(tmp_path, own_configs, config, method):
    records = sweep(tmp_path / "results.jsonl", *method, *GRID, config=config)
    assert [record.kind for record in records] == ["float", "point", "point", "point", "point"]
    for record, point in zip(records[1:], POINTS, strict=True):
        results = validate(tmp_path / "results.json", *method, *point, config=config)
        same(record, results)
        assert baseline_of(record, records) is records[0]
        assert records[0].metrics == results["metrics"]["float"]
    assert records[4].metrics != records[1].metrics


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "options"),
    [
        ("mini/vqa", []),
        ("mini/captioning", ["--model.beams", "1", "--model.iterations", "1", "--data.limit", "8"]),
    ],
)
def test_tasks_that_do_not_factor_have_the_numbers_of_validate(tmp_path, config, options):
    records = sweep(tmp_path / "results.jsonl", *VANILLA, "--sweep.bits", "[32,4]", *options, config=config)
    assert [len(record.details.get("captions", {})) for record in records] == [8 * ("captioning" in config)] * 3
    for record, bits in zip(records[1:], (32, 4), strict=True):
        widths = ["--quantize.bits", str(bits)]
        same(record, validate(tmp_path / "results.json", *VANILLA, *widths, *options, config=config))


def test_towers_are_evaluated_once_a_width(tmp_path, monkeypatch):
    ran = []
    real = Runner._run_missing

    def counted(self, hashes):
        ran.extend(self._memory.missing(hashes))
        real(self, hashes)

    monkeypatch.setattr(Runner, "_run_missing", counted)
    widths = "[32,8,6,4]"
    sweep(tmp_path / "r.jsonl", *VANILLA, "--sweep.vision_bits", widths, "--sweep.text_bits", widths)
    assert (ran.count("vision"), ran.count("text")) == (4, 4)


def test_points_that_would_take_too_much_memory_together_are_calibrated_in_parts(tmp_path, monkeypatch):
    grid = [*VANILLA, "--sweep.vision_bits", "[32,4]", "--sweep.text_bits", "[8,4]"]
    together = sweep(tmp_path / "together.jsonl", *grid)
    monkeypatch.setattr("lit_clipq.sweep.runner.MOST_BYTES", 1)
    apart = sweep(tmp_path / "apart.jsonl", *grid)
    assert [record.to_line() for record in apart] == [record.to_line() for record in together]


def test_seeds_and_methods_are_axes(tmp_path):
    path = tmp_path / "results.jsonl"
    stages = '{"mine": ["grids", "ranges"]}'
    records = sweep(path, "--sweep.recipes", "[vanilla]", "--sweep.stages", stages, "--sweep.seeds", "[1,2]")
    found = [(record.method, record.seed) for record in records[1:]]
    assert found == [("vanilla", 1), ("vanilla", 2), ("mine", 1), ("mine", 2)]
    assert records[1].scores.keys() == records[1].metrics.keys()


def test_a_second_run_measures_nothing(tmp_path, monkeypatch):
    path = tmp_path / "results.jsonl"
    sweep(path, *VANILLA, "--sweep.bits", "[8]")
    before = path.read_bytes()
    monkeypatch.setattr(Runner, "run", lambda *_: pytest.fail("measured again"))
    sweep(path, *VANILLA, "--sweep.bits", "[8]")
    assert path.read_bytes() == before


def test_a_grid_grows_by_what_it_lacks(tmp_path):
    path = tmp_path / "results.jsonl"
    sweep(path, *VANILLA, "--sweep.bits", "[8]")
    assert [r.widths_in_words for r in sweep(path, *VANILLA, "--sweep.bits", "[4,8]")] == ["W32A32", "W4A4", "W8A8"]


def test_a_point_that_fails_is_told_and_the_others_go_on(tmp_path, capsys, monkeypatch):
    path = tmp_path / "results.jsonl"
    real = Runner._measured

    def failing(self, point, *rest):
        if point.recipe.bits.vision_weight == 8:
            raise RuntimeError("CUDA out of memory\nmore words")
        return real(self, point, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Runner, "_measured", failing)
        told = refused(capsys, path, *VANILLA, "--sweep.bits", "[8,4]")
    failed = "vanilla W8A8 with seed 0: RuntimeError: CUDA out of memory more words"
    assert f"1 of 2 points failed, the first of them {failed}" in told
    records = read_records(path)
    assert [record.error is None for record in records] == [True, False, True]
    assert records[1].metrics == {}
    again = sweep(path, *VANILLA, "--sweep.bits", "[8,4]")
    assert path.read_text().count("\n") == 3
    assert all(record.error is None for record in again)
    assert [record.id for record in again] == [record.id for record in records]


def test_a_point_that_cannot_be_planned_does_not_stop_the_others(tmp_path, capsys):
    stages = '{"fine": ["grids", "ranges"], "broken": ["grids", "no_scales_in_sight"]}'
    assert "unknown stage" in refused(capsys, tmp_path / "r.jsonl", "--sweep.stages", stages)
    assert list(tmp_path.iterdir()) == []
    told = refused(capsys, tmp_path / "r.jsonl", *VANILLA, "--quantize.exclude", "nothing.*", "--sweep.bits", "[8,4]")
    assert "2 of 2 points failed" in told
    assert "'nothing.*' matches none" in told


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--sweep.bits", "[]"], "sweep.bits is empty"),
        (["--sweep.bits", "[1]"], "bits must be 2 to 16, or 32 for float; got 1"),
        (["--sweep.recipes", "[nonsense]"], "unknown recipe 'nonsense'"),
        (["--quantize.recipe", "null"], "a sweep needs a method"),
        (["--quantize.dry_run", "true"], "leave out --quantize.dry_run"),
        (["--quantize.save", "folder"], "leave out --quantize.save"),
        (["--resume", "true"], "leave out --resume"),
        (["--sweep.shard", "3/9", "--sweep.bits", "[8,4]"], "sweep.shard 3/9 has no point"),
        (["--quantize.weight_bits", "4", "--sweep.vision_bits", "[8]"], "disagree about the weights"),
    ],
)
def test_what_cannot_be_swept_is_refused_before_anything_is_written(tmp_path, capsys, options, told):
    assert told in refused(capsys, tmp_path / "results.jsonl", *VANILLA, *options)
    assert list(tmp_path.iterdir()) == []


def test_points_of_other_data_are_refused_unless_asked_for(tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    sweep(path, *VANILLA, "--sweep.bits", "[8]")
    before = path.read_bytes()
    other = [*VANILLA, "--sweep.bits", "[8]", "--data.limit", "30"]
    assert "holds points of other data; give another --results" in refused(capsys, path, *other)
    assert path.read_bytes() == before
    assert len(sweep(path, *other, "--sweep.mix", "true")) == 4


def test_shards_together_are_the_sweep(tmp_path):
    grid = [*VANILLA, "--sweep.vision_bits", "[8,4]", "--sweep.text_bits", "[8]"]
    whole = sweep(tmp_path / "results.jsonl", *grid)
    for part in ("1/2", "2/2"):
        assert main(["sweep", "--config", "mini/retrieval", *FEW, *grid, "--sweep.shard", part, "--results",
                     str(tmp_path / "results.jsonl")]) == 0  # fmt: skip
    shards = read_records(tmp_path / "results.1-of-2.jsonl", tmp_path / "results.2-of-2.jsonl")
    assert [record.to_line() for record in shards] == [record.to_line() for record in whole]


KILLED = """
import os, signal, sys
from lit_clipq import cli
from lit_clipq.sweep import file, runner
stage, args = sys.argv[1], sys.argv[2:]
def kill(*_): os.kill(os.getpid(), signal.SIGKILL)
if stage == "calibration": runner.Runner._run_towers = kill
if stage == "torn line":
    real, left = file._write, [3]
    def torn(handle, line):
        left[0] -= 1
        real(handle, line if left[0] else line[: len(line) // 2])
        if not left[0]: kill()
    file._write = torn
if stage == "order": file.ResultsFile.put_in_order = kill
cli.main(args)
"""


@pytest.mark.slow
def test_a_sweep_that_was_killed_leaves_the_same_file_when_it_goes_on(tmp_path):
    grid = ["sweep", "--config", "mini/retrieval", *FEW, *VANILLA, "--sweep.bits", "[32,8,4]", "--sweep.seeds", "[0,1]"]
    whole = tmp_path / "whole.jsonl"
    assert main([*grid, "--results", str(whole)]) == 0
    for stage in ("calibration", "torn line", "order"):
        path = tmp_path / f"{stage}.jsonl"
        args = [*grid, "--results", str(path)]
        killed = subprocess.run([sys.executable, "-c", KILLED, stage, *args], cwd=ROOT, env=os.environ, check=False)
        assert killed.returncode == -signal.SIGKILL
        if stage == "torn line":
            assert not path.read_text().endswith("\n")
        assert main(args) == 0
        assert path.read_bytes() == whole.read_bytes(), stage
