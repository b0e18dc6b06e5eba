"""Every shipped configuration: parsed, instantiated, and run as far as its data allows."""

import json
from pathlib import Path

import pytest
import yaml

from lit_clipq.cli import main

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
