"""Checkpoints of a training, looked at before anything is computed."""

import zipfile
from pathlib import Path

import torch

from lit_clipq.errors import ConfigError, ModelError
from lit_clipq.models.weights_file import foreign_objects


def check_training_checkpoint(path: str | Path | None, weights_only: bool | None) -> None:
    """Refuse a checkpoint that cannot be read, before data is prepared and features are computed.

    Args:
        path: File that `lightning fit` wrote, a folder of a sharded one, or a name that Lightning resolves.
        weights_only: Whether pickled objects are refused; None means yes.

    Raises:
        ConfigError: There is no such file.
        ModelError: It is damaged, no checkpoint, or holds objects whose pickle code would be run; names them.
    """
    if path is None or path in ("best", "last", "hpc") or str(path).startswith("registry") or "://" in str(path):
        return  # Lightning finds these
    file = Path(path)
    if file.is_dir():
        return  # a sharded one; where a single file is needed, reading it says so
    if not file.exists():
        raise ConfigError(f"the checkpoint {path} does not exist; give --ckpt_path a file that `lightning fit` wrote")
    try:
        torch.load(file, map_location="cpu", mmap=zipfile.is_zipfile(file), weights_only=weights_only is not False)
    except Exception as error:
        objects = foreign_objects(file, error)
        if objects:
            raise ModelError(
                f"the checkpoint {path} holds objects that are no tensors ({', '.join(objects[:3])}), and restoring "
                "them runs pickle code; where you trust the file, give --weights_only false, else another --ckpt_path"
            ) from error
        told = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
        raise ModelError(
            f"the checkpoint {path} cannot be read ({told}); it was cut short or is none; give --ckpt_path another"
        ) from error
