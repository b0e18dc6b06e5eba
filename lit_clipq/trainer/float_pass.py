"""The pass over the float network, and the measurement of it that is remembered between runs."""

import hashlib
import logging
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch import LightningDataModule
from torch import distributed as dist

from lit_clipq.analysis.caption_run import digest_of
from lit_clipq.analysis.comparison import write_json
from lit_clipq.analysis.measurement import Measurement
from lit_clipq.checkpoint import state_hash
from lit_clipq.contracts import IdentifiedData, MeasuredTask, TwoTowerTask
from lit_clipq.errors import ConfigError
from lit_clipq.paths import cache_dir
from lit_clipq.trainer.attached import QuantizeCallback, observing_of
from lit_clipq.trainer.origin import versions

if TYPE_CHECKING:
    from lit_clipq.trainer.trainer import QuantTrainer

log = logging.getLogger(__name__)
_FLOAT_LOOP = "LIT_CLIPQ_FLOAT_LOOP"  # how the first process tells those it starts whether the float pass runs
_MEASUREMENT_FORMAT = 3  # of remembered measurements


def float_pass(
    trainer: "QuantTrainer",
    run: Callable[[], object],
    callback: QuantizeCallback,
    task: MeasuredTask,
    datamodule: LightningDataModule | None,
    parts: dict[str, object] | None,
) -> Measurement:
    """Measure the float network by `run`, or read the measurement where it is remembered."""
    referenced = isinstance(task, TwoTowerTask) and task.uses_reference
    if isinstance(task, TwoTowerTask):
        task.forget_reference()
    cache = None if referenced else _cache_file(trainer, parts)  # what towers make is not remembered
    if cache is not None and (found := remembered(trainer, cache)) is not None:
        log.info("float measurement read from %s", cache)
        return found
    callback.paused = True
    try:
        run()
    finally:
        callback.paused = False
    if isinstance(task, TwoTowerTask):
        task.keep_reference()
    measured = Measurement.of(task, datamodule)
    if cache is not None and trainer.is_global_zero:
        try:
            write_json(cache, asdict(measured))
        except OSError as error:
            log.warning("the float measurement is not remembered: %s", error)
    return measured


def remembered(trainer: "QuantTrainer", cache: Path) -> Measurement | None:
    """Read a remembered measurement; all ranks find it or none does, although another run may write it now.

    The first process decides. It tells those it is about to start by the environment, and once there is a
    process group (a second evaluation of the same program) by a broadcast.
    """
    if dist.is_available() and dist.is_initialized():
        found: Measurement | None = trainer.strategy.broadcast(
            Measurement.read(cache) if trainer.is_global_zero else None
        )
        return found
    if not trainer.is_global_zero and os.environ.get(_FLOAT_LOOP) == "run":
        return None
    found = Measurement.read(cache)
    if trainer.is_global_zero:
        os.environ[_FLOAT_LOOP] = "run" if found is None else "skip"
    elif found is None:
        raise ConfigError(f"the float measurement {cache} vanished while the run was starting; start it again")
    return found


def _cache_file(trainer: "QuantTrainer", parts: dict[str, object] | None) -> Path | None:
    """Name the file of this float measurement; `None` where it cannot be trusted to be the same.

    Ranks on other machines may see another cache folder, those that another program started (torchrun) another
    moment of it, and all ranks must take the same way. To Lightning a process that it started itself looks as
    if another program had (both set `LOCAL_RANK`): only the former knows what the first process decided.
    """
    environment = getattr(trainer.strategy, "cluster_environment", None)
    apart = trainer.world_size > 1 and (environment is None or environment.creates_processes_externally)
    grouped = dist.is_available() and dist.is_initialized()
    decided = not trainer.is_global_zero and _FLOAT_LOOP in os.environ
    if observing_of(trainer):
        return None
    if not trainer.float_cache or trainer.num_nodes > 1 or (apart and not grouped and not decided) or parts is None:
        return None
    return cache_dir() / "float" / f"{digest_of(parts)[:32]}.json"


def fingerprint(
    trainer: "QuantTrainer", task: MeasuredTask, datamodule: LightningDataModule | None, ckpt_path: str | Path | None
) -> dict[str, object] | None:
    """Return everything that decides the float measurement; `None` where the data cannot tell."""
    if not isinstance(datamodule, IdentifiedData):
        return None
    datamodule.preprocessing = task.preprocessing
    datamodule.prepare_data()
    datamodule.setup("validate")
    return {
        "format": _MEASUREMENT_FORMAT,
        "model": state_hash(task),
        "checkpoint": None if ckpt_path is None else hashlib.sha256(Path(ckpt_path).read_bytes()).hexdigest(),
        "task": type(task).__name__,
        "roots": sorted(task.roots()),  # the size that is remembered is theirs
        "options": {key: repr(value) for key, value in sorted(dict(task.hparams).items())},
        "data": datamodule.fingerprint(),
        "limit": repr((trainer.limit_val_batches, trainer.limit_test_batches)),
        "precision": str(trainer.precision),
        "device": trainer.strategy.root_device.type,
        "versions": versions(),
    }
