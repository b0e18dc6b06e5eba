"""A Trainer whose `validate` and `test` measure the float network first, then the quantized one, and that sweeps.

Longer than other files: all of it works on the set-up and the loops of Lightning's Trainer, which only it touches.
"""

import hashlib
import importlib.metadata
import logging
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from rich.console import Console
from torch import distributed as dist

from lit_clipq.analysis.caption_run import CaptionFiles, digest_of
from lit_clipq.analysis.comparison import Comparison, IntegerResult, Interval, write_json
from lit_clipq.analysis.measurement import Measurement
from lit_clipq.analysis.records import PointRecord
from lit_clipq.api import QuantizationReport
from lit_clipq.checkpoint import state_hash
from lit_clipq.contracts import EncodingTask, IdentifiedData, MeasuredTask, Observing, Quantizing, TwoTowerTask, require
from lit_clipq.errors import ConfigError
from lit_clipq.export import ExportOptions, Reference, Samples, check_target, embeddings
from lit_clipq.export.backend import IntegerTowers
from lit_clipq.metrics.functional.bootstrap import paired_bootstrap
from lit_clipq.models.training_checkpoint import check_training_checkpoint
from lit_clipq.nn.swap import QuantizationMap
from lit_clipq.paths import cache_dir
from lit_clipq.recipes import Recipe
from lit_clipq.runtime import load
from lit_clipq.runtime.folder import TOWER_FILES

if TYPE_CHECKING:
    from lit_clipq.export import ExportReport
from lit_clipq.sensitivity import Analysis
from lit_clipq.sweep import ResultsFile, SweepOptions
from lit_clipq.sweep.progress import SweepProgress
from lit_clipq.sweep.ray_engine import RayEngine, Worker
from lit_clipq.sweep.runner import Bench, Point, Records, Runner
from lit_clipq.sweep.session import identity_of, points_of, require_sweepable, results_file, shard_path
from lit_clipq.trainer_analysis import run_analysis

log = logging.getLogger(__name__)
_FLOAT_LOOP = "LIT_CLIPQ_FLOAT_LOOP"  # how the first process tells those it starts whether the float pass runs
_MEASUREMENT_FORMAT = 3  # of remembered measurements
_PACKAGES = ("lit-clipq", "torch", "torchvision", "lightning", "open_clip_torch", "torchmetrics", "timm")


QuantizeCallback = Quantizing[Recipe, QuantizationReport]
"""The callback that quantizes, with this program's recipes and reports."""


class QuantTrainer(Trainer):
    """Lightning's Trainer, with float-then-quantized evaluation.

    Args:
        *args: Lightning's.
        results: Where `results.json` is written.
        resume: Whether to go on from the captions that an interrupted run left beside `results`; captioning only.
        float_cache: Whether the float measurement is remembered between runs, by model, data and options.
        backend: `onnxruntime` exports the quantized CLIP and evaluates it a third time, with integer products.
        **kwargs: Lightning's.
    """

    def __init__(
        self,
        *args: Any,
        results: str = "results.json",
        resume: bool = False,
        float_cache: bool = True,
        backend: Literal["torch", "onnxruntime"] = "torch",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.backend = backend
        _check_launcher(self.strategy)
        self.results = results
        self.resume = resume
        self.float_cache = float_cache
        self.comparison: Comparison | None = None
        self.analysis: Analysis | None = None
        self.exported: ExportReport | None = None
        """What `export` wrote."""
        self.command = ""
        """The command line, where there is one; for the records of a sweep."""
        self.sweep_worker: tuple[Worker, list[str]] | None = None
        """What a Ray worker runs, with the command line that it reads; set by the command line."""
        self.swept: Path | None = None
        """The file of the last sweep."""
        self._work: Callable[[Callable[[], Any]], None] | None = None
        self.page: Path | None = None
        """The page of pictures with their captions, after a run of captioning."""

    def fit(  # type: ignore[override]
        self,
        model: LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Train, after a look at the checkpoint to continue from.

        Args:
            model: A task.
            train_dataloaders: Loaders, if there is no datamodule.
            val_dataloaders: Loaders of the evaluations between epochs.
            datamodule: One of `datamodules`.
            ckpt_path: Checkpoint to continue from.
            weights_only: Whether loading the checkpoint refuses pickled objects.
        """
        check_training_checkpoint(ckpt_path, weights_only)
        super().fit(model, train_dataloaders, val_dataloaders, datamodule, ckpt_path, weights_only)

    def validate(  # type: ignore[override]
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = True,
        datamodule: LightningDataModule | None = None,
        weights_only: bool | None = None,
    ) -> Any:
        """Evaluate float, then quantized, and write `results.json`.

        Args:
            model: A task.
            dataloaders: Loaders, if there is no datamodule.
            ckpt_path: Checkpoint of the task to load first.
            verbose: Whether Lightning prints its own table; the comparison replaces it.
            datamodule: One of `datamodules`.
            weights_only: Whether loading the checkpoint refuses pickled objects.

        Returns:
            Metrics of the last pass, one dictionary a loader, as Lightning returns them.
        """
        _check_limit("limit_val_batches", self.limit_val_batches)
        return self._compare(super().validate, model, dataloaders, ckpt_path, verbose, datamodule, weights_only)

    def test(  # type: ignore[override]
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = True,
        datamodule: LightningDataModule | None = None,
        weights_only: bool | None = None,
    ) -> Any:
        """Evaluate float, then quantized, and write `results.json`; arguments as for `validate`.

        Args:
            model: A task.
            dataloaders: Loaders, if there is no datamodule.
            ckpt_path: Checkpoint of the task to load first.
            verbose: Whether Lightning prints its own table; the comparison replaces it.
            datamodule: One of `datamodules`.
            weights_only: Whether loading the checkpoint refuses pickled objects.

        Returns:
            Metrics of the last pass, one dictionary a loader, as Lightning returns them.
        """
        _check_limit("limit_test_batches", self.limit_test_batches)
        return self._compare(super().test, model, dataloaders, ckpt_path, verbose, datamodule, weights_only)

    def analyze(
        self,
        model: LightningModule | None = None,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | Path | None = None,
        measure: int = 16,
        left_float: int = 4,
        blocks: bool = True,
        metric: int = 0,
        share: float = 0.5,
    ) -> Analysis:
        """Say what quantizing each layer, block, tower and operand costs, and write `analysis.json` (`--results`).

        Args:
            model: A task.
            datamodule: One of `datamodules`; only its calibration data is looked at, but for `metric`.
            ckpt_path: Checkpoint of the task to load first.
            measure: For how many layers, and as many operands, the error of the embedding is measured beside the
                prediction that all have; -1 for all.
            left_float: For how many layers the tower is also measured with all quantized but this one; -1 for all.
            blocks: Whether every block and tower is measured.
            metric: For how many layers the task is evaluated with this layer alone quantized.
            share: What share of the predicted error the patterns for `quantize.exclude` and `quantize.widths` remove.

        Returns:
            The analysis.

        Raises:
            ConfigError: Where nothing is quantized, or by a method whose errors cannot be predicted.
        """
        task, callback = require(model, MeasuredTask), self._quantizing()
        recipe = callback.recipe if callback is not None and callback.active else None
        if metric < 0:
            raise ConfigError(f"metric must be at least 0, got {metric}")
        if callback is None or recipe is None:
            raise ConfigError("the analysis needs a method and less than 32 bits; give --quantize.recipe")
        if self.is_global_zero:
            _check_writable(Path(self.results))
        self.analysis = run_analysis(
            self, task, datamodule, callback, ckpt_path,
            measure=measure, left_float=left_float, blocks=blocks, metric=metric, share=share,
        )  # fmt: skip
        origin = {"task": type(task).__name__, "model": task.model_name, "pretrained": task.pretrained}
        content = {**origin, **self.analysis.to_json(), "quantize": recipe.to_json()}
        write_json(Path(self.results), {**content, "versions": versions(), "command": _command()})
        return self.analysis

    def export_model(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        export: ExportOptions = ExportOptions(),  # noqa: B008 - frozen
    ) -> None:
        """Quantize the task's CLIP, or load it quantized, and export it; nothing is evaluated.

        Args:
            model: A task.
            datamodule: One of `datamodules`, for calibration.
            export: Where and how.

        Raises:
            ConfigError: If nothing is quantized, or the quantized CLIP cannot be exported.
            ModelError: If the exported graphs compute something else than the network does.
        """
        from lit_clipq.export import export_clip  # names what is not installed

        callback, task = self._quantizing(), require(model, MeasuredTask)
        if callback is None or not callback.active or callback.dry_run or "clip" not in task.roots():
            raise ConfigError(
                "expected a task with a CLIP that is quantized, to export it; give --quantize.recipe, or the folder of "
                "a quantized model with --quantize.load"
            )
        check_target(export.path, force=export.force)
        if isinstance(datamodule, IdentifiedData):
            datamodule.preprocessing = task.preprocessing
            datamodule.prepare_data()
            datamodule.setup("validate")
        self._data_connector.attach_data(model, datamodule=datamodule)
        callback.reset()
        callback.preflight(self, task, weights_are_final=True)
        loaded: Any = task.loaded
        samples = Samples.make(loaded.preprocessing)
        reference = embeddings(loaded, samples)
        model.to(self.strategy.root_device)
        callback.quantize_now(self, model)
        model.cpu()
        about = {"recipe": None if callback.recipe is None else callback.recipe.to_json(), "reference": "float weights"}
        self.exported = export_clip(loaded, export, about=about, reference=reference, samples=samples)

    export = export_model  # the subcommand; the parser's group of a function's name would be that of `--export.*`

    def sweep(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
        sweep: SweepOptions = SweepOptions(),  # noqa: B008 frozen
    ) -> list[PointRecord]:
        """Measure a grid of methods, widths and seeds, and append a line for each point to `results.jsonl`.

        A point has the numbers of a `validate` of its options. Points that are in the file already are not measured
        again; one that failed is told in its line and tried again by the next run.

        Args:
            model: A task.
            datamodule: One of `datamodules`.
            ckpt_path: Checkpoint of the task to load first.
            weights_only: Whether loading the checkpoint refuses pickled objects.
            sweep: The grid, and where it is measured.

        Returns:
            The records of the grid, the float network's first.

        Raises:
            PointsFailedError: In the end, if any point failed.
        """
        run = self._sweep_run(model, datamodule, ckpt_path, weights_only, sweep)
        self.swept = path = shard_path(Path(self.results), sweep)
        with results_file(path, run.records.identity, run.points, mix=sweep.mix) as (file, missing):
            progress = SweepProgress(len(missing), Console(), quiet=not self.is_global_zero)
            if missing or file.baseline is None:
                with progress:
                    self._sweep(run, missing, file, progress, sweep)
        baseline = file.baseline
        found = file.records(point.id for point in run.points)
        return found if baseline is None else [baseline, *found]

    def measure_points(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None,
        ckpt_path: str | Path | None,
        weights_only: bool | None,
        sweep: SweepOptions,
        points: Collection[str],
        baseline: PointRecord | None,
        keep: Callable[[PointRecord], None],
    ) -> None:
        """Measure some points of a sweep, or the float network alone, without a file: what a Ray worker does.

        Args:
            model: As for `sweep`.
            datamodule: As for `sweep`.
            ckpt_path: As for `sweep`.
            weights_only: As for `sweep`.
            sweep: The whole grid, or the part that the sweep is for.
            points: Ids of the points to measure.
            baseline: The record of the float network, where it is measured.
            keep: Takes a record as soon as it is there.
        """
        run = self._sweep_run(model, datamodule, ckpt_path, weights_only, sweep)
        wanted = [point for point in run.points if point.id in points]
        if len(wanted) < len(points):
            raise ConfigError(
                "this worker has other code, model or data than the process that started the sweep; give all machines "
                "the same"
            )
        with SweepProgress(len(wanted), Console(), quiet=True) as progress:
            self._measure(run, wanted, baseline, keep, progress)

    def _sweep_run(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None,
        ckpt_path: str | Path | None,
        weights_only: bool | None,
        sweep: SweepOptions,
    ) -> "_SweepRun":
        """Check everything that can be checked before a sweep, and list its points."""
        _check_limit("limit_val_batches", self.limit_val_batches)
        check_training_checkpoint(ckpt_path, weights_only)
        quantizing = self._quantizing()
        callback = require_sweepable(quantizing, self.world_size, resume=self.resume)
        assert quantizing is not None  # noqa: S101 - checked above
        task = require(model, MeasuredTask)
        quantizing.reset()
        if ckpt_path is None:
            task.prepare_weights()
        quantizing.preflight(self, task, weights_are_final=ckpt_path is None)
        parts = self._fingerprint(task, datamodule, ckpt_path)
        if parts is None:
            raise ConfigError("a sweep needs a data module that can tell its data apart; use one of `datamodules`")
        identity = identity_of(parts, versions())
        device = {"device": _device_name(self.strategy.root_device)}
        records = Records(task, identity, versions() | device, self.command)
        points = points_of(sweep, callback, task, self, identity)
        return _SweepRun(model, task, datamodule, ckpt_path, weights_only, quantizing, parts, records, points)

    def _sweep(
        self, run: "_SweepRun", missing: list[Point], file: ResultsFile, progress: SweepProgress, sweep: SweepOptions
    ) -> None:
        if sweep.engine == "local":
            self._measure(run, missing, file.baseline, file.append, progress)
            return
        if self.sweep_worker is None:
            raise ConfigError("--sweep.engine ray starts the command line anew on its workers; run `lightning sweep`")

        def keep(record: PointRecord) -> None:
            file.append(record)
            if record.kind == "point":
                progress.point(record)

        worker, args = self.sweep_worker
        engine = RayEngine(sweep, worker, args)
        engine.run(missing, file.baseline, keep, lambda point, error: keep(run.records.failed(point, error)))

    def _measure(
        self,
        run: "_SweepRun",
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
                float_measurement=lambda: self._float_pass(
                    evaluate, run.quantizing, run.task, run.datamodule, run.parts
                ),
            )
            Runner(bench, keep, progress).run(points, baseline)

        self._work, run.quantizing.swept = work, True
        try:
            super().validate(run.model, None, run.ckpt_path, False, run.datamodule, run.weights_only)
        finally:
            self._work, run.quantizing.swept = None, False

    def _run_stage(self) -> Any:
        """Run what Lightning would, or in a sweep the work that needs everything set up and may run it many times."""
        if self._work is None:
            return super()._run_stage()
        self._work(super()._run_stage)
        return None

    def _compare(
        self,
        evaluate: Callable[..., Any],
        model: LightningModule | None,
        dataloaders: Any,
        ckpt_path: str | Path | None,
        verbose: bool,
        datamodule: LightningDataModule | None,
        weights_only: bool | None,
    ) -> Any:
        check_training_checkpoint(ckpt_path, weights_only)
        callback = self._quantizing()
        if callback is not None and callback.active and model is not None:
            require(model, MeasuredTask)
        task = model if callback is not None and isinstance(model, MeasuredTask) else None

        def run() -> Any:
            return evaluate(model, dataloaders, ckpt_path, verbose and task is None, datamodule, weights_only)

        if callback is None or task is None or (callback.dry_run and callback.active):
            return run()
        callback.reset()
        self._check_backend(callback, task)
        if self.is_global_zero:
            _check_writable(Path(self.results))
        if ckpt_path is None:
            task.prepare_weights()
        callback.preflight(self, task, weights_are_final=ckpt_path is None)
        captions = CaptionFiles.of(task, Path(self.results), resume=self.resume)
        parts = self._fingerprint(task, datamodule, ckpt_path)
        captions.begin_pass("float", parts)
        measured = self._float_pass(run, callback, task, datamodule, parts)
        captions.end_pass("float", measured.captioned, write=self.is_global_zero)
        outcome, quantized, integer = [measured.metrics], measured, None
        if callback.active:
            samples, reference = self._float_reference(task)
            captions.begin_pass("quantized", None if parts is None else {**parts, "recipe": callback.fingerprint()})
            outcome = run()
            quantized = Measurement.of(task, datamodule)
            captions.end_pass("quantized", quantized.captioned, write=self.is_global_zero)
            if samples is not None:
                integer = self._integer_pass(run, task, samples, reference)
        self.comparison = replace(self._summarise(callback, task, measured, quantized), integer=integer)
        if self.is_global_zero:
            write_json(Path(self.results), self.comparison.to_json())
            self.page = captions.write_page(measured, quantized if callback.active else None)
        return outcome

    def _check_backend(self, callback: QuantizeCallback, task: MeasuredTask) -> None:
        """Refuse a backend for what it cannot evaluate, before anything is evaluated.

        Raises:
            ConfigError: For a task that needs more than embeddings, several processes, or nothing to quantize.
        """
        if self.backend == "torch":
            return
        reason = ""
        if not callback.active:
            reason = "nothing is quantized; give --quantize.recipe"
        elif not isinstance(task, EncodingTask):
            reason = f"the task {type(task).__name__} needs more of the network than embeddings"
        elif self.world_size > 1:
            reason = "it runs in one process; give --trainer.devices 1"
        if reason:
            raise ConfigError(f"--backend {self.backend} cannot be used: {reason}, or leave out --backend")

    def _float_reference(self, task: MeasuredTask) -> tuple[Samples | None, Reference | None]:
        """Embed samples with the network as it is now, where the backend is going to compare with it."""
        if self.backend == "torch":
            return None, None
        loaded: Any = task.loaded
        samples = Samples.make(loaded.preprocessing)
        loaded.model.cpu()
        return samples, embeddings(loaded, samples)

    def _integer_pass(
        self,
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
        return IntegerResult(self.backend, metrics, size, parity, {k: dict(v) for k, v in report.kernels.items()})

    def _quantizing(self) -> QuantizeCallback | None:
        callbacks: list[Callback] = self.callbacks  # type: ignore[attr-defined]
        return next((callback for callback in callbacks if isinstance(callback, Quantizing)), None)

    def _observing(self) -> list[Observing]:
        callbacks: list[Callback] = self.callbacks  # type: ignore[attr-defined]
        return [callback for callback in callbacks if isinstance(callback, Observing)]

    def _float_pass(
        self,
        run: Callable[[], object],
        callback: QuantizeCallback,
        task: MeasuredTask,
        datamodule: LightningDataModule | None,
        parts: dict[str, object] | None,
    ) -> Measurement:
        referenced = isinstance(task, TwoTowerTask) and task.uses_reference
        if isinstance(task, TwoTowerTask):
            task.forget_reference()
        cache = None if referenced else self._cache_file(parts)  # what towers make is not remembered
        if cache is not None and (found := self._remembered(cache)) is not None:
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
        if cache is not None and self.is_global_zero:
            try:
                write_json(cache, asdict(measured))
            except OSError as error:
                log.warning("the float measurement is not remembered: %s", error)
        return measured

    def _remembered(self, cache: Path) -> Measurement | None:
        """Read a remembered measurement; all ranks find it or none does, although another run may write it now.

        The first process decides. It tells those it is about to start by the environment, and once there is a
        process group (a second evaluation of the same program) by a broadcast.
        """
        if dist.is_available() and dist.is_initialized():
            found: Measurement | None = self.strategy.broadcast(
                Measurement.read(cache) if self.is_global_zero else None
            )
            return found
        if not self.is_global_zero and os.environ.get(_FLOAT_LOOP) == "run":
            return None
        found = Measurement.read(cache)
        if self.is_global_zero:
            os.environ[_FLOAT_LOOP] = "run" if found is None else "skip"
        elif found is None:
            raise ConfigError(f"the float measurement {cache} vanished while the run was starting; start it again")
        return found

    def _cache_file(self, parts: dict[str, object] | None) -> Path | None:
        """Name the file of this float measurement; `None` where it cannot be trusted to be the same.

        Ranks on other machines may see another cache folder, those that another program started (torchrun) another
        moment of it, and all ranks must take the same way. To Lightning a process that it started itself looks as
        if another program had (both set `LOCAL_RANK`): only the former knows what the first process decided.
        """
        environment = getattr(self.strategy, "cluster_environment", None)
        apart = self.world_size > 1 and (environment is None or environment.creates_processes_externally)
        grouped = dist.is_available() and dist.is_initialized()
        decided = not self.is_global_zero and _FLOAT_LOOP in os.environ
        if self._observing():
            return None
        if not self.float_cache or self.num_nodes > 1 or (apart and not grouped and not decided) or parts is None:
            return None
        return cache_dir() / "float" / f"{digest_of(parts)[:32]}.json"

    def _fingerprint(
        self, task: MeasuredTask, datamodule: LightningDataModule | None, ckpt_path: str | Path | None
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
            "limit": repr((self.limit_val_batches, self.limit_test_batches)),
            "precision": str(self.precision),
            "device": self.strategy.root_device.type,
            "versions": versions(),
        }

    def _summarise(
        self, callback: QuantizeCallback, task: MeasuredTask, measured: Measurement, quantized: Measurement
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
            observed={o.section: dict(told) for o in self._observing() if (told := o.seen()) is not None},
            command=_command(),
        )


def _command() -> str:
    """Return the command line of this process, the program by its name alone."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


@dataclass(frozen=True)
class _SweepRun:
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


def versions() -> dict[str, str]:
    """Return the versions of this package and of those its numbers depend on."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


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


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _check_writable(path: Path) -> None:
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


def _check_launcher(strategy: Any) -> None:
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


def _check_limit(name: str, limit: int | float) -> None:
    """Refuse an evaluation of nothing.

    Raises:
        ConfigError: The limit on its batches is 0.
    """
    if limit == 0:
        raise ConfigError(
            f"--trainer.{name} 0 leaves nothing to evaluate; give 1 or more batches, a share between 0 and 1, or leave "
            "it out"
        )
