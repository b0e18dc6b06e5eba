"""Every shipped configuration: parsed, instantiated, and run as far as its data allows."""

import json
from pathlib import Path

import pytest
import yaml

from lit_clipq.cli import main
from tests.tasks.vqa_runs import write_data

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
OVERLAYS = sorted(CONFIGS.glob("quantize/*.yaml"))
MINI = sorted(path for path in CONFIGS.glob("mini/*.yaml") if not path.name.startswith("pretrain"))
PRETRAIN = sorted(CONFIGS.glob("mini/pretrain*.yaml"))
TASKS = sorted(CONFIGS.glob("*.yaml"))
CAPTIONING = ["--model.beams", "1", "--model.iterations", "1", "--data.limit", "6"]
FEW = ["--data.limit", "24", "--quantize.calibration_samples", "8", "--quantize.calibration_batch_size", "8"]


def test_every_file_belongs_to_a_family_below():
    assert sorted([*OVERLAYS, *MINI, *PRETRAIN, *TASKS]) == sorted(CONFIGS.rglob("*.yaml"))


@pytest.mark.parametrize("path", MINI, ids=lambda path: path.stem)
def test_mini_configurations_run(path, tmp_path):
    results = tmp_path / "results.json"
    fewer = CAPTIONING if path.stem == "captioning" else []
    recipe = ["--quantize.recipe", "vanilla"]  # those that also train have none of their own
    assert main(["validate", "--config", str(path), *FEW, *fewer, *recipe, "--results", str(results)]) == 0
    content = json.loads(results.read_text())
    assert content["metrics"]["quantized"].keys() == content["metrics"]["float"].keys()
    assert any(not entry["reason"] for entry in content["map"])


@pytest.mark.parametrize("path", OVERLAYS, ids=lambda path: path.stem)
def test_overlays_decide_recipe_and_widths(path, capsys):
    run = ["validate", "--config", "mini/retrieval", "--config", str(path), *FEW, "--quantize.dry_run", "true"]
    recipe = yaml.safe_load(path.read_text())["quantize"]["recipe"]
    if recipe is None:
        return
    assert main(run) == 0
    printed = capsys.readouterr().out
    assert f"recipe {recipe}:" in printed
    name, _, widths = path.stem.rpartition("_w")
    assert name == recipe
    weight, activation = widths.split("a")
    row = next(line for line in printed.splitlines() if "resblocks.0.mlp.c_fc" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")][2:4] == [weight, activation]


@pytest.mark.parametrize("path", TASKS, ids=lambda path: path.stem)
def test_task_configurations_name_the_data_they_lack(path, tmp_path, capsys):
    options = ["--model.pretrained", "null", "--data.root", str(tmp_path / "absent"), "--results", str(tmp_path / "r")]
    if "captioning" in path.stem:
        options += ["--model.lm", "mini-gpt2"]  # the configured one is on the hub
    assert main(["validate", "--config", str(path), *options]) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("error: ")
    assert str(tmp_path / "absent") in told
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", PRETRAIN, ids=lambda path: path.stem)
def test_training_configurations_parse_whole(path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", str(path), "--print_config"])
    assert stopped.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["model"]["init_args"]["name"] == f"mini-{path.stem.removeprefix('pretrain_')}"
    assert config["seed_everything"] == 20261123


def test_the_vqa_configuration_trains_continues_and_is_evaluated(tmp_path, capsys, monkeypatch):
    write_data(tmp_path / "data/vqa")  # where the configuration looks: relative to the working folder
    monkeypatch.chdir(tmp_path)
    small = ["--model.name", "mini-vit", "--model.pretrained", "mini", "--model.head", "mini"]
    data = ["--data.min_answer_count", "1", "--data.train_batch_size", "6"]
    data += ["--data.num_workers", "0"]
    fit = ["fit", "--config", "vqa", *small, *data, "--trainer.accelerator", "cpu", "--model.cache.folder", "cache"]
    steps = ["--trainer.callbacks.init_args.every_n_train_steps", "2", "--trainer.enable_progress_bar", "false"]
    assert main([*fit, *steps, "--trainer.max_epochs", "1"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    # "grey" is no question's most common answer: one of ten answers to each of 36 questions
    counts = "36 questions, 6 vocabulary, 0 questions outside vocabulary, 36 answers outside vocabulary"
    assert f"trained on 12 images, 0 skipped, {counts} last evaluation: vqa_accuracy" in told
    (path,) = tmp_path.glob("runs/vqa/version_0/checkpoints/last.ckpt")
    assert told.endswith(f"--ckpt_path {path.relative_to(tmp_path)}")
    assert main([*fit, "--trainer.max_epochs", "2", "--ckpt_path", str(path)]) == 0
    results = ["--results", "results.json", "--ckpt_path", str(path)]
    recipe = ["--quantize.recipe", "vanilla", "--quantize.include", "*", "--quantize.calibration_samples", "6"]
    assert main(["validate", "--config", "vqa", *small, *data, *recipe, *results]) == 0
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["samples"]["questions"] == 18
    assert {entry["name"].partition(".")[0] for entry in content["map"] if not entry["reason"]} == {"clip", "head"}
