"""How pictures are prepared and which activation is used, said on the command line."""

import json

import pytest
import torch
from PIL import Image

from lit_clipq.cli import main
from lit_clipq.tasks import VQA, Captioning, Retrieval, ZeroShotClassification

QUICK = ["--quantize.recipe", "null", "--data.limit", "16", "--trainer.enable_progress_bar", "false"]


@pytest.mark.parametrize("task", [ZeroShotClassification, Retrieval, VQA])
def test_every_task_prepares_pictures_as_it_is_told(task):
    made = task("mini-vit", "mini", mean=0.5, std=[0.5, 0.25, 1.0], interpolation="bilinear", resize_mode="squash")
    white = made.preprocessing.image(Image.new("RGB", (64, 64), "white"))
    torch.testing.assert_close(white[:, 0, 0], torch.tensor([1.0, 2.0, 0.5]))
    assert dict(made.hparams)["mean"] == 0.5
    assert made.preprocessing.fingerprint != task("mini-vit", "mini").preprocessing.fingerprint


def test_captioning_takes_the_options_too():
    made = Captioning("mini-vit", "mini", preset="mini", quick_gelu=None, mean=0.0, std=1.0)
    white = made.preprocessing.image(Image.new("RGB", (64, 64), "white"))
    torch.testing.assert_close(white[:, 0, 0], torch.ones(3))


def test_the_command_line_sets_them(tmp_path):
    def top1(*options):
        path = tmp_path / "results.json"
        arguments = ["validate", "--config", "mini/classification", *QUICK, "--model.templates", "simple"]
        assert main([*arguments, "--results", str(path), *options]) == 0
        return json.loads(path.read_text())["metrics"]["float"]

    plain = top1()
    published = ["--model.mean", "[0.48145466, 0.4578275, 0.40821073]"]  # as the mini models are prepared for
    assert top1(*published) == plain
    assert top1("--model.mean", "9", "--model.std", "0.01") != plain


@pytest.mark.parametrize(
    ("option", "told"),
    [
        (("--model.std", "0"), "--model.std must be one number above 0, or three, got 0"),
        (("--model.mean", "[1, 2]"), "--model.mean must be one number, or three, got"),
        (("--model.interpolation", "nearest"), "interpolation"),
        (("--model.resize_mode", "crop"), "resize_mode"),
    ],
)
def test_impossible_ones_are_one_sentence(capsys, option, told):
    assert main(["validate", "--config", "mini/classification", *QUICK, *option]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert told in lines[-1]
    assert "Traceback" not in "".join(lines)
