"""What callbacks that look at embeddings add to the results."""

import json

import pytest

from lit_clipq.cli import main

QUICK = ["--config", "quantize/vanilla", "--quantize.calibration_samples", "8", "--trainer.limit_val_batches", "4"]
BOTH = ["--trainer.callbacks+=callbacks.CosineSimilarity", "--trainer.callbacks+=callbacks.Mistakes"]


def validate(tmp_path, task, *args):
    path = tmp_path / "results.json"
    code = main(["validate", "--config", f"mini/{task}", *QUICK, "--results", str(path), *args])
    return code, json.loads(path.read_text()) if path.is_file() else None


@pytest.mark.slow
@pytest.mark.parametrize(("task", "metric"), [("retrieval", "recall@1_i2t"), ("classification", "top1")])
def test_cosines_and_mistakes_agree_with_the_metric(task, metric, tmp_path):
    code, told = validate(tmp_path, task, "--quantize.bits", "4", "--quantize.attention_products", "true", *BOTH)
    assert code == 0
    matched = told["cosine"]["matched"]
    assert matched["float"]["mean"] > told["cosine"]["unmatched"]["float"]["mean"] + 0.1
    assert matched["mean_shift"] == pytest.approx(matched["quantized"]["mean"] - matched["float"]["mean"], abs=1e-9)
    assert 0 < matched["wasserstein"] >= abs(matched["mean_shift"]) - 1e-9
    assert 0.05 < matched["rank_correlation"] < 1
    mistakes = told["mistakes"]
    change = (mistakes["won"] - mistakes["lost"]) / mistakes["pictures"]
    assert change == pytest.approx(told["metrics"]["quantized"][metric] - told["metrics"]["float"][metric], abs=1e-9)
    assert mistakes["lost"] > 0
    assert all(row["float"] != row["quantized"] for row in mistakes["rows"])
    if task == "classification":
        assert all(row["float"] == row["own"] for row in mistakes["rows"])


@pytest.mark.slow
def test_a_float_run_has_the_cosines_of_the_float_network_alone(tmp_path):
    _, told = validate(tmp_path, "retrieval", "--quantize.recipe", "null", *BOTH)
    assert set(told["cosine"]["matched"]) == {"pairs", "float"}
    assert told["mistakes"]["lost"] == 0


@pytest.mark.parametrize(("callback", "option"), [("CosineSimilarity", "unmatched_per_image"), ("Mistakes", "count")])
def test_less_than_one_is_refused(callback, option, tmp_path, capsys):
    code, _ = validate(
        tmp_path, "retrieval", f"--trainer.callbacks+=callbacks.{callback}", f"--trainer.callbacks.{option}", "0"
    )
    assert code == 1
    assert f"{option} must be at least 1, got 0" in capsys.readouterr().err
