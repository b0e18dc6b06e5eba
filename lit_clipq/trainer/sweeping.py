"""A sweep on a Trainer: what it is about, and its points in the place of one evaluation."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule

from lit_clipq.analysis.records import PointRecord
from lit_clipq.contracts import MeasuredTask, require
from lit_clipq.errors import ConfigError
from lit_clipq.models.training_checkpoint import check_training_checkpoint
from lit_clipq.sweep import ResultsFile, SweepOptions
from lit_clipq.sweep.progress import SweepProgress
from lit_clipq.sweep.ray_engine import RayEngine
from lit_clipq.sweep.runner import Bench, Point, Records, Runner
from lit_clipq.sweep.session import identity_of, points_of, require_sweepable
from lit_clipq.trainer.attached import QuantizeCallback, quantizing_of
from lit_clipq.trainer.checks import check_limit
from lit_clipq.trainer.float_pass import fingerprint, float_pass
from lit_clipq.trainer.origin import versions

if TYPE_CHECKING:
    from lit_clipq.trainer.trainer import QuantTrainer


@dataclass(frozen=True)
class SweepRun:
    """What one sweep is about."""

    model: LightningModule
    task: MeasuredTask
    datamodule: LightningDataModule | None
    ckpt_path: str | Path | None
    weights_only: bool | None
    quantizing: QuantizeCallback
    parts: dict[str, object]
    records: Records
    points: list[Point]


def sweep_run(
    trainer: "QuantTrainer",
    model: LightningModule,
    datamodule: LightningDataModule | None,
    ckpt_path: str | Path | None,
    weights_only: bool | None,
    sweep: SweepOptions,
) -> SweepRun:
    """Check everything that can be checked before a sweep, and list its points."""
    check_limit("limit_val_batches", trainer.limit_val_batches)
    check_training_checkpoint(ckpt_path, weights_only)
    quantizing = quantizing_of(trainer)
    callback = require_sweepable(quantizing, trainer.world_size, resume=trainer.resume)
    assert quantizing is not None  # noqa: S101 - checked above
    task = require(model, MeasuredTask)
    quantizing.reset()
    if ckpt_path is None:
        task.prepare_weights()
    quantizing.preflight(trainer, task, weights_are_final=ckpt_path is None)
    parts = fingerprint(trainer, task, datamodule, ckpt_path)
    if parts is None:
        raise ConfigError("a sweep needs a data module that can tell its data apart; use one of `datamodules`")
    identity = identity_of(parts, versions())
    device = {"device": _device_name(trainer.strategy.root_device)}
    records = Records(task, identity, versions() | device, trainer.command)
    points = points_of(sweep, callback, task, trainer, identity)
    return SweepRun(model, task, datamodule, ckpt_path, weights_only, quantizing, parts, records, points)


def run_points(
    trainer: "QuantTrainer",
    run: SweepRun,
    missing: list[Point],
    file: ResultsFile,
    progress: SweepProgress,
    sweep: SweepOptions,
) -> None:
    """Measure the missing points of a sweep, here or by the workers of Ray."""
    if sweep.engine == "local":
        measure_run(trainer, run, missing, file.baseline, file.append, progress)
        return
    if trainer.sweep_worker is None:
        raise ConfigError("--sweep.engine ray starts the command line anew on its workers; run `lightning sweep`")

    def keep(record: PointRecord) -> None:
        file.append(record)
        if record.kind == "point":
            progress.point(record)

    worker, args = trainer.sweep_worker
    engine = RayEngine(sweep, worker, args)
    engine.run(missing, file.baseline, keep, lambda point, error: keep(run.records.failed(point, error)))


def measure_run(
    trainer: "QuantTrainer",
    run: SweepRun,
    points: list[Point],
    baseline: PointRecord | None,
    keep: Callable[[PointRecord], None],
    progress: SweepProgress,
) -> None:
    """Let Lightning set everything up once, and measure in the place of its one evaluation."""

    def work(evaluate: Callable[[], Any]) -> None:
        bench = Bench(
            task=run.task,
            data=run.datamodule,
            records=run.records,
            evaluate=evaluate,
            scoring=torch.inference_mode,
            float_measurement=lambda: float_pass(
                trainer, evaluate, run.quantizing, run.task, run.datamodule, run.parts
            ),
        )
        Runner(bench, keep, progress).run(points, baseline)

    run.quantizing.swept = True
    try:
        trainer.evaluate_by(work, run.model, run.datamodule, run.ckpt_path, run.weights_only)
    finally:
        run.quantizing.swept = False


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
