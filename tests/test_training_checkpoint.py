"""A checkpoint of a training is looked at before anything is computed, and nothing in it is executed."""

import argparse

import numpy as np
import pytest
import torch

from lit_clipq.cli import main
from lit_clipq.errors import ConfigError, ModelError
from lit_clipq.models.training_checkpoint import check_training_checkpoint


@pytest.mark.parametrize(
    ("beside", "name"),
    [(argparse.Namespace(lr=1), "argparse.Namespace"), (np.float64(0.5), "numpy._core.multiarray.scalar")],
)
def test_objects_that_would_run_code_are_named(tmp_path, beside, name, capsys):
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": {"a": torch.ones(1)}, "hyper_parameters": beside}, path)
    with pytest.raises(ModelError) as caught:
        check_training_checkpoint(path, None)
    for part in (name, "pickle code", "--weights_only false"):
        assert part in str(caught.value)
    check_training_checkpoint(path, weights_only=False)  # the user trusts it
    assert main(["validate", "--config", "mini/classification", "--ckpt_path", str(path)]) == 1
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith(f"error: the checkpoint {path} holds objects")


def test_others_are_told_as_before(tmp_path):
    path = tmp_path / "cut.ckpt"
    torch.save({"state_dict": {"a": torch.ones(1000)}}, path)
    check_training_checkpoint(path, None)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ModelError, match="cut short"):
        check_training_checkpoint(path, None)
    with pytest.raises(ConfigError, match="does not exist"):
        check_training_checkpoint(tmp_path / "absent.ckpt", None)
    for name in (None, "last", "best"):
        check_training_checkpoint(name, None)
