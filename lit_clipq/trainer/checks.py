"""What is refused before an hour of evaluation."""

import tempfile
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher

from lit_clipq.errors import ConfigError


def check_writable(path: Path) -> None:
    """Refuse a results path that cannot be written, before an hour of evaluation.

    Raises:
        ConfigError: If the path is a folder, or its folder cannot be made or written to.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise ConfigError(f"results cannot be written to {path}: {error}; give another --results") from error


def check_launcher(strategy: Any) -> None:
    """Refuse workers that are spawned or forked out of this process.

    The result of an evaluation is this Trainer's, and what such a worker measures never comes back to it.

    Raises:
        ConfigError: The strategy starts its processes that way.
    """
    if isinstance(strategy.launcher, _MultiProcessingLauncher):
        raise ConfigError(spawning_refused(f"of type {type(strategy).__name__}"))


def spawning_refused(strategy: str) -> str:
    """Say why a strategy that spawns or forks its workers is refused, and what to use."""
    return (
        f"--trainer.strategy {strategy} spawns or forks its workers, whose results do not come back; give ddp, which "
        "starts the program once for each device, or use torchrun"
    )


def check_limit(name: str, limit: int | float) -> None:
    """Refuse an evaluation of nothing.

    Raises:
        ConfigError: The limit on its batches is 0.
    """
    if limit == 0:
        raise ConfigError(
            f"--trainer.{name} 0 leaves nothing to evaluate; give 1 or more batches, a share between 0 and 1, or leave "
            "it out"
        )
