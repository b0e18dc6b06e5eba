"""What the command line sees of the data modules."""

import pytest
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel

import datamodules
from datamodules import QuantDataModule


@pytest.fixture
def parse(monkeypatch):
    monkeypatch.setattr("sys.argv", ["lightning"])

    def instantiate(*args: str) -> QuantDataModule:
        cli = LightningCLI(
            BoringModel,
            QuantDataModule,
            subclass_mode_data=True,
            run=False,
            args=[*args],
            seed_everything_default=False,
            trainer_defaults={"logger": False, "accelerator": "cpu"},
        )
        return cli.datamodule

    return instantiate


def test_short_options_reach_the_data_module(parse):
    data = parse(
        "--data=datamodules.CocoRetrieval",
        "--data.root=x",
        "--data.preset=val2017",
        "--data.on_error=skip",
        "--data.captions_per_image=null",
        "--data.calibration_root=y",
        "--data.limit=7",
    )
    assert isinstance(data, datamodules.CocoRetrieval)
    assert (str(data.root), data.preset, data.on_error) == ("x", "val2017", "skip")
    assert (data.captions_per_image, str(data.calibration_root), data.limit) == (None, "y", 7)


WITHOUT_EVALUATION = ("QuantDataModule", "MiniPretrain", "MiniCaptionText")


@pytest.mark.parametrize("name", [n for n in datamodules.__all__ if n not in WITHOUT_EVALUATION])
def test_every_data_module_takes_the_common_options(parse, name):
    data = parse(f"--data=datamodules.{name}", "--data.root=x", "--data.batch_size=3", "--data.held_out_calibration=9")
    assert isinstance(data, getattr(datamodules, name))
    assert (data.batch_size, data.held_out_calibration) == (3, 9)


def test_an_unknown_option_is_refused(parse):
    with pytest.raises(SystemExit):
        parse("--data=datamodules.CocoRetrieval", "--data.root=x", "--data.rooot=y")
