"""Every shipped configuration: parsed, instantiated, and run as far as its data allows."""

import json
from itertools import product, starmap
from pathlib import Path

import pytest
import yaml

from lit_clipq.analysis.records import read_records
from lit_clipq.cli import main
from tests.tasks.vqa_runs import write_data

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
WIDTHS = sorted(CONFIGS.glob("quantize/w*a*.yaml"))
METHODS = sorted(set(CONFIGS.glob("quantize/*.yaml")) - set(WIDTHS))
MINI = sorted(path for path in CONFIGS.glob("mini/*.yaml") if not path.name.startswith("pretrain"))
PRETRAIN = sorted(CONFIGS.glob("mini/pretrain*.yaml"))
TASKS = sorted(CONFIGS.glob("*.yaml"))
SWEEPS = sorted(path for path in CONFIGS.glob("sweeps/*.yaml"))
MINI_SWEEPS = sorted(CONFIGS.glob("sweeps/mini/*.yaml"))
FAST = {"retrieval", "classification", "coco_retrieval", "vanilla", "w4a8"}
"""Files that the fast tests run: of a kind one or two; a method with each width, a width with each method."""


def named(*paths: Path):
    """One set of parameters with the names of the files as its id; slow where none of them is to run fast."""
    marks = () if FAST & {path.stem for path in paths} else pytest.mark.slow
    return pytest.param(*paths, id="-".join(path.stem for path in paths), marks=marks)


CAPTIONING = ["--model.beams", "1", "--model.iterations", "1", "--data.limit", "6"]
FEW = ["--data.limit", "24", "--quantize.calibration_samples", "8", "--quantize.calibration_batch_size", "8"]


def test_every_file_belongs_to_a_family_below():
    assert sorted([*METHODS, *WIDTHS, *MINI, *PRETRAIN, *TASKS, *SWEEPS, *MINI_SWEEPS]) == sorted(
        CONFIGS.rglob("*.yaml")
    )


@pytest.mark.parametrize("path", map(named, MINI))
def test_mini_configurations_run(path, tmp_path):
    results = tmp_path / "results.json"
    fewer = CAPTIONING if path.stem == "captioning" else []
    recipe = ["--quantize.recipe", "vanilla"]  # those that also train have none of their own
    assert main(["validate", "--config", str(path), *FEW, *fewer, *recipe, "--results", str(results)]) == 0
    content = json.loads(results.read_text())
    assert content["metrics"]["quantized"].keys() == content["metrics"]["float"].keys()
    assert any(not entry["reason"] for entry in content["map"])


def crossed():
    """Every method with a width of each kind, every width with a recipe by name and one in place: they set nothing of
    each other's."""
    for method, width in product(METHODS, WIDTHS):
        if width.stem in ("w4a4", "w4a8") or method.stem in ("vanilla", "gptq"):
            yield method, width


@pytest.mark.parametrize(("method", "width"), starmap(named, crossed()))
def test_methods_and_widths_go_together(method, width, capsys):
    options = yaml.safe_load(method.read_text())["quantize"]
    stages = [name for stage in options.get("stages") or () for name in stage]
    recipe = "+".join(stages) or options["recipe"]
    code, told = dry_run(capsys, f"quantize/{method.stem}", f"quantize/{width.stem}")
    if method.stem == "float":
        assert code == 1
        assert "nothing is quantized" in told
    else:
        assert code == 0
        assert method.stem in (recipe, *stages)
        assert f"recipe {recipe}:" in told
        assert widths_of("resblocks.0.mlp.c_fc", told) == named_widths(width.stem)


@pytest.mark.parametrize("earlier", ["w4a8", "w4a4"])
def test_a_later_width_leaves_nothing_of_an_earlier_one(earlier, capsys):
    later = "w2a8" if earlier == "w4a4" else "w6a6"
    code, told = dry_run(capsys, "quantize/vanilla", f"quantize/{earlier}", f"quantize/{later}")
    assert code == 0
    assert widths_of("resblocks.0.mlp.c_fc", told) == named_widths(later)


def test_a_later_method_leaves_nothing_of_an_earlier_one(capsys):
    _, alone = dry_run(capsys, "quantize/ptq4clip_paper", "quantize/w4a8")
    for earlier in ("vanilla", "gptq"):
        _, after = dry_run(capsys, f"quantize/{earlier}", "quantize/ptq4clip_paper", "quantize/w4a8")
        assert after == alone


def dry_run(capsys, *overlays: str) -> tuple[int, str]:
    configs = [option for overlay in overlays for option in ("--config", overlay)]
    code = main(["validate", "--config", "mini/retrieval", *configs, *FEW, "--quantize.dry_run", "true"])
    printed = capsys.readouterr()
    return code, printed.out + printed.err


def widths_of(layer: str, told: str) -> list[str]:
    """Widths of weight and activations in the printed map's row of a layer."""
    row = next(line for line in told.splitlines() if layer in line)
    return [cell.strip() for cell in row.strip("│").split("│")][2:4]


def named_widths(overlay: str) -> list[str]:
    return overlay.removeprefix("w").split("a")


@pytest.mark.parametrize("path", map(named, TASKS))
def test_task_configurations_name_the_data_they_lack(path, tmp_path, capsys):
    options = ["--model.pretrained", "null", "--data.root", str(tmp_path / "absent"), "--results", str(tmp_path / "r")]
    if "captioning" in path.stem:
        options += ["--model.lm", "mini-gpt2"]  # the configured one is on the hub
    assert main(["validate", "--config", str(path), *options]) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("error: ")
    assert str(tmp_path / "absent") in told
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_sweep_configurations_name_the_data_they_lack(path, tmp_path, capsys):
    options = ["--model.name", "mini-vit", "--model.pretrained", "null", "--data.root", str(tmp_path / "absent")]
    if "captioning" in path.stem:
        options += ["--model.lm", "mini-gpt2"]  # the configured one is on the hub
    assert main(["sweep", "--config", str(path), *options, "--results", str(tmp_path / "r.jsonl")]) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("error: ")
    assert str(tmp_path / "absent") in told
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("path", MINI_SWEEPS, ids=lambda path: path.stem)
def test_mini_sweep_configurations_run(path, tmp_path):
    results = tmp_path / "results.jsonl"
    fewer = CAPTIONING if path.stem == "captioning" else []
    small = [
        "--sweep.recipes",
        "[vanilla]",
        "--sweep.vision_bits",
        "[32,8]",
        "--sweep.text_bits",
        "[4]",
        "--sweep.seeds",
        "[0]",
    ]
    assert main(["sweep", "--config", str(path), *FEW, *fewer, *small, "--results", str(results)]) == 0
    records = read_records(results)
    assert [record.kind for record in records] == ["float", "point", "point"]
    assert records[1].metrics.keys() == records[0].metrics.keys()


@pytest.mark.parametrize("path", [*SWEEPS, *MINI_SWEEPS], ids=lambda path: path.stem)
def test_sweep_configurations_have_the_grid_of_the_seed_and_the_options_of_their_task(path):
    content = yaml.safe_load(path.read_text())
    widths = [32, 16, 8, 4, 2]
    assert content["sweep"] == {"recipes": ["ptq4clip"], "vision_bits": widths, "text_bits": widths, "seeds": [0, 1, 2]}
    own = CONFIGS / path.relative_to(CONFIGS / "sweeps")
    if own.is_file():
        task = yaml.safe_load(own.read_text())
        for part in ("model", "data"):
            assert content[part]["class_path"] == task[part]["class_path"]
            assert content[part]["init_args"].items() <= task[part]["init_args"].items()
        assert content["quantize"]["calibration_samples"] == task["quantize"]["calibration_samples"]


@pytest.mark.parametrize("path", PRETRAIN, ids=lambda path: path.stem)
def test_training_configurations_parse_whole(path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", str(path), "--print_config"])
    assert stopped.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["model"]["init_args"]["name"] == f"mini-{path.stem.removeprefix('pretrain_')}"
    assert config["seed_everything"] == 20261123


@pytest.mark.slow
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
