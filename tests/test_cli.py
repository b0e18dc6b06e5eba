"""The command line, run as a user runs it, on a few pictures of the mini world."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from callbacks import Quantize
from datamodules import MiniRetrieval
from lit_clipq.cli import find_config, main, resolve_configs
from lit_clipq.errors import ConfigError, DataError
from lit_clipq.tasks import Retrieval
from lit_clipq.trainer import QuantTrainer
from lit_clipq.trainer.float_pass import remembered

ROOT = Path(__file__).resolve().parents[1]
LIMIT = ["--data.limit", "60", "--quantize.calibration_samples", "32"]


def validate(tmp_path: Path, *options: str, config: str = "mini/retrieval") -> dict:
    path = tmp_path / "results.json"
    assert main(["validate", "--config", config, *LIMIT, "--results", str(path), *options]) == 0
    return json.loads(path.read_text())


def refused(capsys: pytest.CaptureFixture[str], *options: str, config: str = "mini/retrieval") -> str:
    """Run, expect exit code 1 and one line on stderr; return it."""
    assert main(["validate", "--config", config, *LIMIT, *options]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert lines[-1].startswith("error: ")
    assert "Traceback" not in "".join(lines)
    return lines[-1]


def test_a_run_prints_the_table_and_writes_everything(tmp_path, capsys):
    results = validate(tmp_path, "--quantize.bits", "2")
    printed = capsys.readouterr().out
    for word in ("float", "quantized", "difference", "recall@1_i2t", "model size (MB)", "calibration (s)", "N: "):
        assert word in printed
    assert results["task"] == "Retrieval"
    assert (results["model"], results["pretrained"], results["recipe"]) == ("mini-vit", "mini", "ptq4clip")
    assert set(results["bits"].values()) == {2}
    assert set(results["metrics"]["float"]) == set(results["metrics"]["quantized"])
    assert results["metrics"]["float"]["recall@1_i2t"] > results["metrics"]["quantized"]["recall@1_i2t"]
    interval = results["metrics"]["difference"]["recall@1_i2t"]
    assert interval["low"] <= interval["value"] <= interval["high"] < 0
    assert results["size_bytes"]["quantized"] < results["size_bytes"]["float"] / 3
    assert results["calibration_samples"] == 32
    assert results["calibration_seconds"] > 0
    assert results["float_macs_share"] < 0.01
    assert any(entry["weight_bits"] == 2 for entry in results["map"])
    assert results["samples"]["images"] == 60
    assert set(results["versions"]) >= {"lit-clipq", "torch", "lightning", "open_clip_torch"}
    assert results["seed"] == 0


@pytest.mark.parametrize("options", [("--quantize.recipe", "null"), ("--quantize.bits", "32")])
def test_without_quantization_both_columns_are_the_same(tmp_path, options):
    results = validate(tmp_path, *options)
    assert results["metrics"]["quantized"] == results["metrics"]["float"]
    assert all(d == {"value": 0, "low": 0, "high": 0} for d in results["metrics"]["difference"].values())
    assert results["map"] == []
    assert results["float_macs_share"] == 1.0
    assert results["size_bytes"]["float"] == results["size_bytes"]["quantized"]


@pytest.mark.slow
def test_the_float_measurement_is_remembered_until_model_or_data_change(tmp_path, cache_folder, monkeypatch):
    def remembered() -> set[Path]:
        return set((cache_folder / "float").glob("*.json"))

    first = validate(tmp_path, "--quantize.recipe", "vanilla")
    before = remembered()
    again = validate(tmp_path, "--quantize.recipe", "vanilla")
    assert remembered() == before
    assert again["metrics"] == first["metrics"]
    validate(tmp_path, "--data.limit", "50", "--quantize.recipe", "vanilla")
    assert len(remembered()) == len(before) + 1
    for path in before:
        path.write_text("{ cut short")
    assert validate(tmp_path, "--quantize.recipe", "vanilla")["metrics"] == first["metrics"]


@pytest.mark.slow
def test_classification_runs_with_both_towers_of_the_resnet(tmp_path):
    results = validate(tmp_path, "--model.name", "mini-resnet", config="mini/classification")
    assert set(results["metrics"]["float"]) >= {"top1"}
    towers = {entry["tower"] for entry in results["map"] if entry["weight_bits"] == 8}
    assert towers == {"vision", "text"}


@pytest.mark.slow
def test_widths_of_towers_and_operands_reach_the_map(tmp_path):
    results = validate(tmp_path, "--quantize.vision_bits", "6", "--quantize.text_weight_bits", "4")
    widths = {(e["tower"], e["weight_bits"], e["activation_bits"]) for e in results["map"] if not e["reason"]}
    layers, products, table = (
        {("vision", 6, 6), ("text", 4, 8)},
        {("vision", None, 6), ("text", None, 8)},
        ("text", 4, 32),
    )
    assert widths == layers | products | {table}


def test_a_later_config_wins(tmp_path):
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("quantize:\n  bits: 6\n  recipe: vanilla\n  attention_products: true\n")
    results = validate(tmp_path, "--config", str(overlay))
    assert set(results["bits"].values()) == {6}
    assert any(entry["kind"] == "matmul" and not entry["reason"] for entry in results["map"])


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path, capsys):
    path = tmp_path / "results.json"
    options = ["--results", str(path), "--quantize.dry_run", "true", "--quantize.recipe", "vanilla"]
    assert main(["validate", "--config", "mini/retrieval", *LIMIT, *options]) == 0
    printed = capsys.readouterr().out
    assert "clip.visual.conv1" in printed
    assert "attention products are off" in printed
    assert "1 pass over the calibration set" in printed
    assert "MB stored beside the model" in printed
    assert not path.exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--quantize.recipe", "vanila"), "unknown recipe 'vanila', expected one of"),
        (("--quantize.bits", "17"), "bits must be 2 to 16, or 32 for float; got 17"),
        (("--quantize.bits", "1"), "bits must be 2 to 16"),
        (("--quantize.vision_bits", "4", "--quantize.weight_bits", "8"), "decide with vision_weight_bits"),
        (("--quantize.include", "[visual.*]"), "matches none of the"),
        (("--quantize.include", "visual.*"), "pattern 'visual.*' matches none of the"),
        (("--quantize.exclude", "*"), "no layer is left to quantize"),
        (("--quantize.dry_run", "true", "--quantize.bits", "32"), "dry_run was given, but nothing is quantized"),
        (("--trainer.accelerator", "abacus"), "abacus"),
        (("--trainer.devices", "0"), "devices"),
        (("--ckpt_path", "/nowhere/last.ckpt"), "/nowhere/last.ckpt"),
        (("--quantize.calibration_samples", "0"), "calibration_samples must be at least 1, got 0"),
        (("--model.name", "ViT-B-23"), "ViT-B-32"),
        (("--model.pretrained", "/nowhere/weights.pt"), "/nowhere/weights.pt"),
        (("--model.ks", "[0]"), "at least 1"),
        (("--data.preset", "huge"), "huge"),
        (("--quantize.bitz", "8"), "bitz"),
        (("--quantize.bits", "eight"), "eight"),
        (("--quantize.options", "{twin: true}"), "has no option twin"),
    ],
)
def test_bad_options_end_in_one_sentence(capsys, tmp_path, options, expected):
    path = tmp_path / "results.json"
    assert expected in refused(capsys, "--results", str(path), *options)
    assert not path.exists()


def test_results_that_cannot_be_written_are_refused_before_the_evaluation(capsys, tmp_path):
    assert "results cannot be written" in refused(capsys, "--results", str(tmp_path))
    (tmp_path / "file").write_text("")
    assert "results cannot be written" in refused(capsys, "--results", str(tmp_path / "file" / "results.json"))


def test_an_unknown_configuration_lists_the_shipped_ones(capsys):
    assert "did you mean 'coco_retrieval'" in refused(capsys, config="coco_retreival")


@pytest.mark.parametrize("folder", ["", "configs/", "/elsewhere/configs/"])
@pytest.mark.parametrize("suffix", ["", ".yaml"])
def test_a_method_with_a_width_in_its_name_is_told_as_two_overlays(capsys, folder, suffix):
    told = refused(capsys, config=f"{folder}quantize/ptq4clip_paper_w4a8{suffix}")
    assert told.endswith("give --config quantize/ptq4clip_paper --config quantize/w4a8")


def test_an_unknown_method_with_a_width_in_its_name_is_an_unknown_configuration(capsys):
    assert "did you mean 'quantize/ptq4clip'" in refused(capsys, config="quantize/ptq4clop_w4a8")


def test_shipped_configurations_are_found_by_every_spelling(tmp_path, monkeypatch):
    shipped = (ROOT / "configs" / "coco_retrieval.yaml").read_text()
    monkeypatch.chdir(tmp_path)
    for name in ("coco_retrieval", "coco_retrieval.yaml", "configs/coco_retrieval.yaml", "./configs/coco_retrieval"):
        assert find_config(name).read_text() == shipped
    with pytest.raises(ConfigError):
        find_config("../coco_retrieval_missing")


def test_a_file_of_the_same_name_comes_before_the_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "coco_retrieval.yaml").write_text("seed_everything: 1\n")
    assert find_config("coco_retrieval.yaml") == Path("coco_retrieval.yaml")


def test_config_options_are_replaced_in_every_position(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("")
    resolved = resolve_configs(["validate", "-c", str(path), f"--config={path}", "--data.root", "x"])
    assert resolved == ["validate", "-c", str(path), f"--config={path}", "--data.root", "x"]


@pytest.mark.slow
def test_the_console_script_ends_with_code_1_and_no_traceback(tmp_path):
    command = [sys.executable, "-m", "lit_clipq.cli", "validate", "--config", "configs/coco_retrieval.yaml"]
    result = subprocess.run(
        [*command, "--model.pretrained", "null", "--data.root", str(tmp_path / "absent")],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert str(tmp_path / "absent") in result.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_a_configuration_that_is_no_text_is_refused(capsys, tmp_path):
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8 text" in refused(capsys, "--config", str(path))


def test_a_task_without_training_cannot_be_fitted(capsys):
    assert main(["fit", "--config", "mini/retrieval", "--data.limit", "8"]) == 1
    assert "training_step" in capsys.readouterr().err.splitlines()[-1]


def test_an_interruption_ends_without_a_traceback(capsys, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("datamodules.mini.ensure_world", interrupted)
    assert main(["validate", "--config", "mini/retrieval", *LIMIT]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"


def test_an_error_in_a_loading_process_is_told_without_its_traceback(capsys, monkeypatch):
    def broken(path):
        raise DataError(f"Picture {path} cannot be decoded.")

    monkeypatch.setattr("datamodules.images.load_rgb", broken)  # damaged after the check, seen by a forked worker
    line = refused(capsys, "--trainer.float_cache", "false", "--data.num_workers", "1")
    assert re.fullmatch(r"error: Picture \S+ cannot be decoded\.", line)


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_costs_no_results(tmp_path, cache_folder, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("lit_clipq.trainer.float_pass.cache_dir", lambda: tmp_path / "file")
    assert validate(tmp_path)["metrics"]["float"]


@pytest.mark.parametrize(("decided", "expected"), [("run", None), ("skip", "vanished")])
def test_later_ranks_do_as_the_first_decided(tmp_path, monkeypatch, decided, expected):
    """Another run may write or remove the remembered measurement while the processes start."""
    monkeypatch.setenv("LIT_CLIPQ_FLOAT_LOOP", decided)
    monkeypatch.setattr(QuantTrainer, "is_global_zero", property(lambda _: False))
    trainer = QuantTrainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    path = tmp_path / "float.json"
    if expected:
        with pytest.raises(ConfigError, match=expected):
            remembered(trainer, path)
    else:
        path.write_text('{"metrics": {}, "scores": {}, "samples": {}}')
        assert remembered(trainer, path) is None


@pytest.mark.slow
def test_a_trainer_measures_float_and_quantizes_again(tmp_path):
    task = Retrieval("mini-vit", "mini")
    callback = Quantize(recipe="vanilla", calibration_samples=8)
    options = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu", "use_distributed_sampler": False}
    trainer = QuantTrainer(**options, callbacks=[callback], results=str(tmp_path / "results.json"))
    trainer.float_cache = False
    first, second = [], []
    for found in (first, second):
        trainer.validate(task, datamodule=MiniRetrieval(limit=20))
        content = json.loads((tmp_path / "results.json").read_text())
        found += [content["metrics"], content["map"], {n: x.clone() for n, x in task.clip.state_dict().items()}]
    assert first[:2] == second[:2]
    assert all(torch.equal(value, second[2][name]) for name, value in first[2].items())


@pytest.mark.slow
def test_a_network_whose_float_weights_are_gone_is_not_measured_as_float(tmp_path):
    kept = tmp_path / "kept"
    validate(tmp_path, "--quantize.recipe", "vanilla", "--quantize.save", str(kept))
    task, callback = Retrieval("mini-vit", "mini"), Quantize(load=str(kept))
    options = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu", "use_distributed_sampler": False}
    trainer = QuantTrainer(**options, callbacks=[callback], results=str(tmp_path / "results.json"))
    trainer.validate(task, datamodule=MiniRetrieval(limit=20))
    with pytest.raises(ConfigError, match="did not keep its float weights"):
        trainer.validate(task, datamodule=MiniRetrieval(limit=20))


STAGES = "[{grids: {softmax: twin, gelu: twin}}, {search: {distance: l2}}]"
FEW_LAYERS = ["--quantize.include", "clip.visual.transformer.resblocks.0.*"]


def test_stages_and_widths_from_the_command_line(tmp_path):
    widths = '{"clip.visual.*.mlp.c_fc": w4a16, "*.out_proj": float}'
    results = validate(tmp_path, "--quantize.stages", STAGES, "--quantize.widths", widths, *FEW_LAYERS)
    assert results["recipe"] == "grids+search"
    assert results["quantize"]["stages"][-1]["search"]["distance"] == "l2"
    of = {entry["name"].rpartition("resblocks.0.")[2]: entry for entry in results["map"] if not entry["reason"]}
    assert (of["mlp.c_fc"]["weight_bits"], of["mlp.c_fc"]["activation_bits"]) == (4, 16)
    assert (of["mlp.c_proj"]["weight_bits"], of["mlp.c_proj"]["activation_bits"]) == (8, 8)
    assert "attn.out_proj" not in of


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            ("--quantize.stages", "[{search: {}}, {grids: {}}]"),
            "stage grids works on grids and must stand",
        ),
        (("--quantize.stages", "[{grids: {}}, {serach: {}}]"), "unknown stage 'serach'"),
        (("--quantize.stages", "[{grids: {}}, {search: {distance: l7}}]"), "distance must be one of hessian, l2"),
        (("--quantize.stages", "[3]"), "unknown stage '[3]'"),
        (("--quantize.stages", "grids"), "quantize.stages"),
        (("--quantize.widths", "{nothing.*: 4}"), "quantize.widths pattern 'nothing.*' matches none"),
        (("--quantize.widths", "{clip.*: w4b8}"), "the widths of 'clip.*' must be"),
        (("--quantize.widths", "[4]"), "quantize.widths"),
        (("--quantize.options.bits", "4"), "quantize.options takes no bits; give --quantize.bits"),
        (("--quantize.options.search", "4"), "search takes its options as a dictionary, got 4"),
        (("--quantize.options", '{"search.grid.count": 0}'), "count must be 1 to 10000, got 0"),
        (("--quantize.options", '{"search.grid.low": 5}'), "low must be above 0 and below high"),
        (("--quantize.options.temperature", "0"), "temperature must be above 0"),
        (("--quantize.options.seed", "1e30"), "seed"),
    ],
)
def test_stages_widths_and_options_that_cannot_be_are_told_in_one_sentence(tmp_path, capsys, options, told):
    run = ["validate", "--config", "mini/retrieval", *LIMIT, "--results", str(tmp_path / "r.json"), *options]
    assert main(run) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert told in lines[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_processes_take_up_the_remembered_float_measurement(tmp_path, cache_folder):
    """To Lightning a process that it started itself looks as if another program had started it."""
    shutil.rmtree(cache_folder / "float", ignore_errors=True)
    alone = validate(tmp_path, "--quantize.recipe", "vanilla")
    (remembered,) = (cache_folder / "float").glob("*.json")
    content = json.loads(remembered.read_text())
    remembered.write_text(json.dumps({**content, "samples": {**content["samples"], "images": 12345}}))
    path = tmp_path / "two.json"
    options = [*LIMIT, "--quantize.recipe", "vanilla", "--results", str(path), "--trainer.devices", "2"]
    result = subprocess.run(
        [sys.executable, "-m", "lit_clipq.cli", "validate", "--config", "mini/retrieval", *options],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=150,
    )
    remembered.unlink()
    assert result.returncode == 0, result.stderr
    together = json.loads(path.read_text())
    assert together["samples"]["images"] == 12345  # only the remembered file says so
    assert together["metrics"] == alone["metrics"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["callbacks", "datamodules"])
def test_a_package_that_shadows_ours_is_named(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("")
    result = subprocess.run(
        [sys.executable, "-m", "lit_clipq.cli", "validate", "--config", "mini/retrieval"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
    )
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert f"error: `{name}` was imported from {tmp_path}, expected {ROOT}" in result.stderr
