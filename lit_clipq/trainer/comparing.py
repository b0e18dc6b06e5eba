"""One evaluation: the float network, the quantized one, and where it is asked for its export."""

import logging
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule

from lit_clipq.analysis.caption_run import CaptionFiles
from lit_clipq.analysis.comparison import Comparison, IntegerResult, Interval, write_json
from lit_clipq.analysis.measurement import Measurement
from lit_clipq.contracts import EncodingTask, MeasuredTask, require
from lit_clipq.errors import ConfigError
from lit_clipq.export import ExportOptions, Reference, Samples, embeddings
from lit_clipq.export.backend import IntegerTowers
from lit_clipq.metrics.functional.bootstrap import paired_bootstrap
from lit_clipq.models.training_checkpoint import check_training_checkpoint
from lit_clipq.nn.swap import QuantizationMap
from lit_clipq.paths import cache_dir
from lit_clipq.runtime import load
from lit_clipq.runtime.folder import TOWER_FILES
from lit_clipq.trainer.attached import QuantizeCallback, observing_of, quantizing_of
from lit_clipq.trainer.checks import check_writable
from lit_clipq.trainer.float_pass import fingerprint, float_pass
from lit_clipq.trainer.origin import command_line, versions

if TYPE_CHECKING:
    from lit_clipq.trainer.trainer import QuantTrainer

log = logging.getLogger(__name__)


def compare(
    trainer: "QuantTrainer",
    evaluate: Callable[..., Any],
    model: LightningModule | None,
    dataloaders: Any,
    ckpt_path: str | Path | None,
    verbose: bool,
    datamodule: LightningDataModule | None,
    weights_only: bool | None,
) -> Any:
    """Evaluate float, then quantized, and write `results.json`; arguments as for `QuantTrainer.validate`.

    Args:
        trainer: Keeps the comparison.
        evaluate: Lightning's `validate` or `test`.
        model: See there.
        dataloaders: See there.
        ckpt_path: See there.
        verbose: See there.
        datamodule: See there.
        weights_only: See there.
    """
    check_training_checkpoint(ckpt_path, weights_only)
    callback = quantizing_of(trainer)
    if callback is not None and callback.active and model is not None:
        require(model, MeasuredTask)
    task = model if callback is not None and isinstance(model, MeasuredTask) else None

    def run() -> Any:
        return evaluate(model, dataloaders, ckpt_path, verbose and task is None, datamodule, weights_only)

    if callback is None or task is None or (callback.dry_run and callback.active):
        return run()
    callback.reset()
    _check_backend(trainer, callback, task)
    if trainer.is_global_zero:
        check_writable(Path(trainer.results))
    if ckpt_path is None:
        task.prepare_weights()
    callback.preflight(trainer, task, weights_are_final=ckpt_path is None)
    captions = CaptionFiles.of(task, Path(trainer.results), resume=trainer.resume)
    parts = fingerprint(trainer, task, datamodule, ckpt_path)
    captions.begin_pass("float", parts)
    measured = float_pass(trainer, run, callback, task, datamodule, parts)
    captions.end_pass("float", measured.captioned, write=trainer.is_global_zero)
    outcome, quantized, integer = [measured.metrics], measured, None
    if callback.active:
        samples, reference = _float_reference(trainer, task)
        captions.begin_pass("quantized", None if parts is None else {**parts, "recipe": callback.fingerprint()})
        outcome = run()
        quantized = Measurement.of(task, datamodule)
        captions.end_pass("quantized", quantized.captioned, write=trainer.is_global_zero)
        if samples is not None:
            integer = _integer_pass(trainer, run, task, samples, reference)
    trainer.comparison = replace(_summarise(trainer, callback, task, measured, quantized), integer=integer)
    if trainer.is_global_zero:
        write_json(Path(trainer.results), trainer.comparison.to_json())
        trainer.page = captions.write_page(measured, quantized if callback.active else None)
    return outcome


def _check_backend(trainer: "QuantTrainer", callback: QuantizeCallback, task: MeasuredTask) -> None:
    """Refuse a backend for what it cannot evaluate, before anything is evaluated.

    Raises:
        ConfigError: For a task that needs more than embeddings, several processes, or nothing to quantize.
    """
    if trainer.backend == "torch":
        return
    reason = ""
    if not callback.active:
        reason = "nothing is quantized; give --quantize.recipe"
    elif not isinstance(task, EncodingTask):
        reason = f"the task {type(task).__name__} needs more of the network than embeddings"
    elif trainer.world_size > 1:
        reason = "it runs in one process; give --trainer.devices 1"
    if reason:
        raise ConfigError(f"--backend {trainer.backend} cannot be used: {reason}, or leave out --backend")


def _float_reference(trainer: "QuantTrainer", task: MeasuredTask) -> tuple[Samples | None, Reference | None]:
    """Embed samples with the network as it is now, where the backend is going to compare with it."""
    if trainer.backend == "torch":
        return None, None
    loaded: Any = task.loaded
    samples = Samples.make(loaded.preprocessing)
    loaded.model.cpu()
    return samples, embeddings(loaded, samples)


def _integer_pass(
    trainer: "QuantTrainer",
    run: Callable[[], object],
    task: MeasuredTask,
    samples: Samples,
    reference: Reference | None,
) -> IntegerResult:
    """Export the quantized CLIP to a folder that vanishes, and evaluate it there."""
    from lit_clipq.export import export_clip

    loaded: Any = task.loaded
    loaded.model.cpu()
    with tempfile.TemporaryDirectory() as folder:
        target = ExportOptions(str(Path(folder) / "export"), fallback="float")
        report = export_clip(loaded, target, reference=reference, samples=samples)
        for name, reason in report.kept_float.items():
            log.warning("layer %s stays float in the export: %s", name, reason)
        with require(task, EncodingTask).encoded_by(IntegerTowers(load(report.path))):
            run()
            metrics = task.results()
    size = sum(report.bytes[file] for file in TOWER_FILES.values())
    parity = {tower: found.to_json() for tower, found in report.parity.items()}
    return IntegerResult(trainer.backend, metrics, size, parity, {k: dict(v) for k, v in report.kernels.items()})


def _summarise(
    trainer: "QuantTrainer",
    callback: QuantizeCallback,
    task: MeasuredTask,
    measured: Measurement,
    quantized: Measurement,
) -> Comparison:
    report = callback.report if callback.active else None
    recipe = callback.recipe if callback.active else None
    return Comparison(
        task=type(task).__name__,
        model=task.model_name,
        pretrained=task.pretrained,
        recipe=recipe.name if recipe else None,
        bits=recipe.bits.by_tower() if recipe else None,
        widths=recipe.bits.in_words() if recipe else "",
        float_metrics=measured.metrics,
        quantized_metrics=quantized.metrics,
        differences=_differences(measured, quantized),
        samples=measured.samples,
        float_bytes=measured.bytes,
        quantized_bytes=quantized.bytes,
        calibration_seconds=report.seconds if report else 0.0,
        calibration_samples=report.samples if report else 0,
        map=report.map if report else QuantizationMap(),
        versions=versions(),
        seed=callback.seed,
        layers={name: asdict(layer) for name, layer in report.layers.items()} if report else {},
        stages=report.stages if report else {},
        quantize_options=recipe.to_json() if recipe else {},
        observed={o.section: dict(told) for o in observing_of(trainer) if (told := o.seen()) is not None},
        command=command_line(),
    )


def _differences(measured: Measurement, quantized: Measurement) -> dict[str, Interval]:
    intervals = {}
    for name, before in measured.scores.items():
        after = quantized.scores[name]
        if before.clusters != after.clusters:
            raise ConfigError(f"float and quantized runs scored different samples of {name}; clear {cache_dir()}")
        intervals[name] = Interval(
            *paired_bootstrap(
                torch.tensor(before.values, dtype=torch.float64),
                torch.tensor(after.values, dtype=torch.float64),
                torch.tensor(before.clusters),
            )
        )
    return intervals
