"""`--quantize.save` and `--quantize.load`, run as a user runs them on a handful of random pictures."""

import json
import shutil

import pytest
import torch
from PIL import Image

from lit_clipq.cli import main

RANDOM = ["--model.pretrained", "null", "--seed_everything", "1", "--quantize.calibration_samples", "8"]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A retrieval task on 16 pictures, with 8 others to calibrate on; the recipe stands in the file."""
    root = tmp_path_factory.mktemp("coco")
    generator = torch.Generator().manual_seed(0)
    (root / "annotations").mkdir()
    for split, count, first in (("val2017", 16, 0), ("train2017", 8, 100)):
        (root / split).mkdir()
        images = [{"id": first + i, "file_name": f"{first + i}.png"} for i in range(count)]
        rows = [{"id": image["id"], "image_id": image["id"], "caption": f"a {image['id']} box"} for image in images]
        (root / f"annotations/captions_{split}.json").write_text(json.dumps({"images": images, "annotations": rows}))
        for image in images:
            pixels = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8, generator=generator)
            Image.fromarray(pixels.numpy()).save(root / split / image["file_name"])
    path = root / "task.yaml"
    path.write_text(f"""
model:
  class_path: lit_clipq.tasks.Retrieval
  init_args: {{name: mini-vit}}
data:
  class_path: datamodules.CocoRetrieval
  init_args: {{root: {root}, preset: val2017, batch_size: 16}}
trainer: {{logger: false, accelerator: cpu}}
quantize: {{recipe: vanilla, bits: 4, options: {{embeddings: true}}}}
""")
    return str(path)


def run(config, results, *options):
    assert main(["validate", "--config", config, *RANDOM, "--results", str(results), *options]) == 0
    return json.loads(results.read_text())


def refused(capsys, config, results, *options):
    assert main(["validate", "--config", config, *RANDOM, "--results", str(results), *options]) == 1
    line = [line for line in capsys.readouterr().err.splitlines() if line][-1]
    assert line.startswith("error: ")
    assert not results.exists()
    return line


@pytest.fixture(scope="module")
def saved(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    results = run(config, folder / "results.json", "--quantize.save", str(folder / "artefact"))
    return folder / "artefact", results


def test_a_loaded_model_reproduces_the_run_that_saved_it(config, saved, tmp_path, capsys):
    artefact, first = saved
    again = run(config, tmp_path / "results.json", "--quantize.load", str(artefact))
    printed = capsys.readouterr().out
    assert "vanilla W4A4" in printed
    for key in ("metrics", "map", "recipe", "bits", "size_bytes", "samples", "quantize", "float_macs_share"):
        assert again[key] == first[key], key
    assert again["calibration_seconds"] == 0 < first["calibration_seconds"]
    assert again["calibration_samples"] == 8
    assert first["size_bytes"]["quantized"] < first["size_bytes"]["float"] / 6


def test_recipe_and_widths_of_the_artefact_win_over_the_configuration_file(config, saved, tmp_path):
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("quantize: {bits: 8, attention_products: true}")
    results = tmp_path / "results.json"
    again = run(config, results, "--config", str(overlay), "--quantize.load", str(saved[0]))
    assert again["bits"] == saved[1]["bits"]
    assert again["metrics"] == saved[1]["metrics"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--quantize.recipe", "vanilla"), "leave out --quantize.recipe"),
        (("--quantize.bits=8", "--quantize.text_bits", "6"), "leave out --quantize.bits, --quantize.text_bits"),
        (("--quantize.attention_products", "true"), "leave out --quantize.attention_products"),
        (("--quantize.save", "elsewhere"), "leave out --quantize.save"),
        (("--quantize.dry_run", "true"), "leave out --quantize.dry_run"),
        (("--model.name", "mini-resnet"), "holds model 'mini-vit', but the run has 'mini-resnet'"),
        (("--seed_everything", "2"), "was made from random weights of mini-vit, but the run's model has other values"),
    ],
)
def test_what_contradicts_an_artefact_is_refused(capsys, config, saved, tmp_path, options, expected):
    load = ("--quantize.load", str(saved[0]))
    assert expected in refused(capsys, config, tmp_path / "results.json", *load, *options)


def test_a_damaged_artefact_is_refused_before_the_evaluation(capsys, config, saved, tmp_path, monkeypatch):
    spoiled = shutil.copytree(saved[0], tmp_path / "artefact")
    with (spoiled / "model.safetensors").open("ab") as file:
        file.write(b"x")

    def evaluate(*args, **kwargs):
        raise AssertionError("evaluated")

    monkeypatch.setattr("lightning.pytorch.Trainer.validate", evaluate)
    line = refused(capsys, config, tmp_path / "results.json", "--quantize.load", str(spoiled))
    assert "cut short or edited" in line


@pytest.mark.parametrize("options", [("--quantize.recipe", "null"), ("--quantize.bits", "32")])
def test_a_float_model_is_not_saved(capsys, config, tmp_path, options):
    save = ("--quantize.save", str(tmp_path / "artefact"))
    assert "nothing is quantized" in refused(capsys, config, tmp_path / "results.json", *save, *options)


def test_a_folder_that_cannot_be_written_is_refused_before_the_evaluation(capsys, config, tmp_path, monkeypatch):
    def evaluate(*args, **kwargs):
        raise AssertionError("evaluated")

    monkeypatch.setattr("lightning.pytorch.Trainer.validate", evaluate)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    for folder, expected in ((tmp_path / "mine", "holds thesis.tex"), (tmp_path / "mine/thesis.tex", "is a file")):
        line = refused(capsys, config, tmp_path / "results.json", "--quantize.save", str(folder))
        assert expected in line
