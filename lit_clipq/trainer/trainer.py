"""A Trainer whose `validate` and `test` measure the float network first, then the quantized one, and that sweeps.

What a run does beside Lightning's loops lies in a module of its own: `comparing`, `sweeping`, `analyzing`, `exporting`.
"""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from rich.console import Console

from lit_clipq.analysis.comparison import Comparison
from lit_clipq.analysis.records import PointRecord
from lit_clipq.errors import ConfigError
from lit_clipq.export import ExportOptions
from lit_clipq.models.training_checkpoint import check_training_checkpoint
from lit_clipq.sensitivity import Analysis
from lit_clipq.sweep import SweepOptions
from lit_clipq.sweep.progress import SweepProgress
from lit_clipq.sweep.ray_engine import Worker
from lit_clipq.sweep.session import results_file, shard_path
from lit_clipq.trainer.analyzing import analyze_task
from lit_clipq.trainer.checks import check_launcher, check_limit
from lit_clipq.trainer.comparing import compare
from lit_clipq.trainer.exporting import export_task
from lit_clipq.trainer.sweeping import measure_run, run_points, sweep_run

if TYPE_CHECKING:
    from lit_clipq.export import ExportReport


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
        check_launcher(self.strategy)
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
        check_limit("limit_val_batches", self.limit_val_batches)
        return compare(self, super().validate, model, dataloaders, ckpt_path, verbose, datamodule, weights_only)

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
        check_limit("limit_test_batches", self.limit_test_batches)
        return compare(self, super().test, model, dataloaders, ckpt_path, verbose, datamodule, weights_only)

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
        self.analysis = analyze_task(
            self, model, datamodule, ckpt_path,
            measure=measure, left_float=left_float, blocks=blocks, metric=metric, share=share,
        )  # fmt: skip
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
        self.exported = export_task(self, model, datamodule, export)

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
        run = sweep_run(self, model, datamodule, ckpt_path, weights_only, sweep)
        self.swept = path = shard_path(Path(self.results), sweep)
        with results_file(path, run.records.identity, run.points, mix=sweep.mix) as (file, missing):
            progress = SweepProgress(len(missing), Console(), quiet=not self.is_global_zero)
            if missing or file.baseline is None:
                with progress:
                    run_points(self, run, missing, file, progress, sweep)
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
        run = sweep_run(self, model, datamodule, ckpt_path, weights_only, sweep)
        wanted = [point for point in run.points if point.id in points]
        if len(wanted) < len(points):
            raise ConfigError(
                "this worker has other code, model or data than the process that started the sweep; give all machines "
                "the same"
            )
        with SweepProgress(len(wanted), Console(), quiet=True) as progress:
            measure_run(self, run, wanted, baseline, keep, progress)

    def evaluate_by(
        self,
        work: Callable[[Callable[[], Any]], None],
        model: LightningModule,
        datamodule: LightningDataModule | None,
        ckpt_path: str | Path | None,
        weights_only: bool | None,
    ) -> None:
        """Let Lightning set everything up once, and do other work in the place of its one evaluation.

        Args:
            work: Gets what evaluates, and may call it many times.
            model: As for `validate`.
            datamodule: As for `validate`.
            ckpt_path: As for `validate`.
            weights_only: As for `validate`.
        """
        self._work = work
        try:
            super().validate(model, None, ckpt_path, False, datamodule, weights_only)
        finally:
            self._work = None

    def _run_stage(self) -> Any:
        """Run what Lightning would, or in a sweep the work that needs everything set up and may run it many times."""
        if self._work is None:
            return super()._run_stage()
        self._work(super()._run_stage)
        return None
