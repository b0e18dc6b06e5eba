"""A Trainer whose `validate` and `test` measure the float network first, then the quantized one."""

import hashlib
import importlib.metadata
import logging
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from torch import distributed as dist

from lit_clipq.analysis.caption_run import CaptionFiles, digest_of
from lit_clipq.analysis.comparison import Comparison, IntegerResult, Interval, write_json
from lit_clipq.analysis.measurement import Measurement
from lit_clipq.api import QuantizationReport
from lit_clipq.checkpoint import state_hash
from lit_clipq.contracts import EncodingTask, IdentifiedData, MeasuredTask, Quantizing, require
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
        self.exported: ExportReport | None = None
        """What `export` wrote."""
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

    def _float_pass(
        self,
        run: Callable[[], object],
        callback: QuantizeCallback,
        task: MeasuredTask,
        datamodule: LightningDataModule | None,
        parts: dict[str, object] | None,
    ) -> Measurement:
        cache = self._cache_file(parts)
        if cache is not None and (found := self._remembered(cache)) is not None:
            log.info("float measurement read from %s", cache)
            return found
        callback.paused = True
        try:
            run()
        finally:
            callback.paused = False
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
        )


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
