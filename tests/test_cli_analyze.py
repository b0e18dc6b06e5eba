"""`lightning analyze` from the command line."""

import json
import shlex

import pytest

from lit_clipq.cli import main
from lit_clipq.report import read_points

SMALL = ["--config", "mini/retrieval", "--quantize.calibration_samples", "8", "--quantize.bits", "4"]


@pytest.mark.slow
def test_an_analysis_is_written_printed_and_can_be_pasted_back(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--quantize.recipe", "vanilla", "--measure", "2", "--left_float", "1", "--metric", "1"]
    assert main(["analyze", *SMALL, *options, "--trainer.limit_val_batches", "2"]) == 0
    told = capsys.readouterr().out
    content = json.loads((tmp_path / "analysis.json").read_text())
    assert not (tmp_path / "results.json").exists()
    for name in content["patterns"]["exclude"]:
        assert f'    - "{name}"' in told
    layers = [row for row in content["sensitivity"] if row["scope"] == "layer"]
    assert sum(row["embedding"] is not None for row in layers) == 2
    assert sum(row["left_float"] is not None for row in layers) == 1
    (evaluated,) = (row for row in layers if row["metrics"])
    assert evaluated["predicted"] == max(row["predicted"] for row in layers)
    assert 0 < evaluated["metrics"]["recall@1_i2t"] <= 1

    (finding,) = read_points([tmp_path]).findings
    flags = shlex.split(finding.patterns.replace("\nor\n", " "))
    assert flags[0::2] == ["--quantize.exclude", "--quantize.widths"]
    for option in (flags[:2], flags[2:]):
        assert main(["validate", *SMALL, "--quantize.recipe", "vanilla", *option, "--quantize.dry_run", "true"]) == 0
    assert "excluded by" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--quantize.recipe", "null"], "needs a method and less than 32 bits"),
        (["--quantize.bits", "32"], "needs a method and less than 32 bits"),
        (["--share", "0", "--quantize.recipe", "vanilla"], "share must be above 0"),
        (["--quantize.options.objective", "fisher"], "Gauss-Newton"),
        (["--measure", "-2"], "measure must be at least -1"),
    ],
)
def test_what_cannot_be_analysed_is_one_sentence(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["analyze", *SMALL, *options]) == 1
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
