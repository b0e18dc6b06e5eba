"""Quantize a task's networks when Lightning is about to evaluate or to train."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import move_data_to_device
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lit_clipq.api import QuantizationReport, Quantized, preview, quantize_many
from lit_clipq.checkpoint import Artefact, ModelIdentity, check_target, identify, read_artefact, save_quantized
from lit_clipq.contracts import (
    Calibrating,
    CalibrationBatch,
    CalibrationData,
    QuantizableTask,
    Quantizing,
    RunningTrainer,
    require,
)
from lit_clipq.errors import ConfigError
from lit_clipq.recipes import BitWidths, Recipe, compose, make_recipe

log = logging.getLogger(__name__)

KEPT = "clip"
"""The root that `save` keeps and `load` brings; a head belongs to its checkpoint."""


class Quantize(pl.Callback):
    """Calibrate and quantize the network before it is evaluated, or before a head is trained on it.

    The more specific width wins: `{vision,text}_{weight,activation}_bits`, then `{vision,text}_bits` and
    `{weight,activation}_bits`, then `bits`; two of equal rank that disagree are an error.

    In `validate` and `test` this happens at the start of the loop, once; in `fit` already in `setup`, before the
    network is wrapped for several devices and before a checkpoint is restored.

    Args:
        recipe: Name of the method (`vanilla`, `base_ptq`, `ptq4clip`, `ptq4clip_paper`); null leaves the network float.
        stages: A method given in place, instead of `recipe`: a list of stages with their options, such as
            `[{equalize: {}}, {grids: {softmax: twin}}, {search: {distance: l2}}]`; see `lit_clipq.stages`. The name of
            a stage of one's own is `module.Class`.
        bits: Width of every weight and activation: 2 to 16, or 32 for float. Default 8.
        vision_bits: Width in the image tower.
        text_bits: Width in the text tower.
        weight_bits: Width of weights.
        activation_bits: Width of activations.
        vision_weight_bits: Width of weights in the image tower.
        vision_activation_bits: Width of activations in the image tower.
        text_weight_bits: Width of weights in the text tower.
        text_activation_bits: Width of activations in the text tower.
        widths: Widths by shell pattern of layer names, on top of those above; of several that match the last one wins.
            A number for both, `float`, or such as `w4a8`, `w4`, `a8`: `{"clip.visual.*.mlp.*": w4a8}`.
        include: Shell patterns of layer names to quantize, or one, such as `clip.visual.*`; empty means all.
        exclude: Shell patterns of layer names to leave float, or one.
        attention_products: Whether QK^T and attention x V are quantized; null takes the recipe's own default.
        options: Further options of the recipe by name.
        calibration_samples: Pictures (with their texts) to calibrate on, over all devices.
        calibration_batch_size: Pictures in one calibration batch.
        seed: Seed of the choice of calibration samples.
        memory_limit_gb: Bound on what calibration may store, in 10^9 bytes; null is no bound.
        dry_run: Print what would be quantized, its cost and its share, and stop.
        save: Folder in which the quantized model is kept.
        load: Folder of a model that was kept; it takes the place of recipe and calibration.
    """

    def __init__(
        self,
        recipe: str | None = None,
        stages: list[str | dict[str, Any]] | None = None,
        bits: int | None = None,
        vision_bits: int | None = None,
        text_bits: int | None = None,
        weight_bits: int | None = None,
        activation_bits: int | None = None,
        vision_weight_bits: int | None = None,
        vision_activation_bits: int | None = None,
        text_weight_bits: int | None = None,
        text_activation_bits: int | None = None,
        widths: dict[str, int | str] | None = None,
        include: list[str] | str | None = None,
        exclude: list[str] | str | None = None,
        attention_products: bool | None = None,
        options: dict[str, Any] | None = None,
        calibration_samples: int = 128,
        calibration_batch_size: int = 32,
        seed: int = 0,
        memory_limit_gb: float | None = None,
        dry_run: bool = False,
        save: str | None = None,
        load: str | None = None,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        flags = {name: value for name, value in given.items() if name.endswith("bits")}
        resolved = BitWidths.resolve(flags, widths)
        for name, value in (
            ("calibration_samples", calibration_samples),
            ("calibration_batch_size", calibration_batch_size),
        ):
            if value < 1:
                raise ConfigError(f"quantize.{name} must be at least 1, got {value}")
        self.recipe: Recipe | None = None
        if recipe is not None or stages is not None:
            chosen: dict[str, Any] = dict(options or {})
            taken = sorted({"bits", "include", "exclude"} & set(chosen))
            if taken:
                raise ConfigError(f"quantize.options takes no {taken[0]}; give --quantize.{taken[0]}")
            if attention_products is not None:
                chosen["attention_products"] = attention_products
            chosen |= {"bits": resolved, "include": _patterns(include), "exclude": _patterns(exclude)}
            self.recipe = compose(stages, **chosen) if stages is not None else make_recipe(str(recipe), **chosen)
        self._artefact: Artefact | None = None
        if load is not None:
            _refuse_beside_load([n for n in (*DECIDED_BY_ARTEFACT, "save", "dry_run") if given[n]])
            self._artefact = read_artefact(load)
            self.recipe = self._artefact.recipe
        self.save = None if save is None else Path(save)
        for flag, asked in (("save", save is not None), ("dry_run", dry_run)):
            if asked and not self.active:
                raise ConfigError(
                    f"--quantize.{flag} was given, but nothing is quantized: "
                    f"give --quantize.recipe and less than 32 bits, or leave out --quantize.{flag}"
                )
        self.calibration_samples = calibration_samples
        self.calibration_batch_size = calibration_batch_size
        self.seed = seed
        self.memory_limit_gb = memory_limit_gb
        self.dry_run = dry_run
        self.paused = False
        self.swept = False
        self._given = given
        self.report: QuantizationReport | None = None
        self._quantized: Quantized | None = None

    @property
    def active(self) -> bool:
        """Whether the run is to quantize anything at all."""
        return self.recipe is not None and not self.recipe.bits.all_float()

    def preflight(self, trainer: RunningTrainer, pl_module: QuantizableTask, *, weights_are_final: bool) -> None:
        """Refuse what cannot be saved or loaded in the end, before anything is evaluated.

        Args:
            trainer: Of the run.
            pl_module: The task.
            weights_are_final: Whether no checkpoint is going to replace the weights.

        Raises:
            ConfigError: For weights that the Trainer does not hold in float32, a folder that cannot be written, a task
                whose model cannot be rebuilt, or a network beside CLIP that would be quantized and not saved.
            ModelError: For a damaged artefact, or one of another model.
        """
        precision = str(trainer.precision)
        if self.active and precision.endswith("-true") and not precision.startswith("32"):
            raise ConfigError(
                f"quantization needs weights in float32, got --trainer.precision {precision}; leave it out, or take "
                "bf16-mixed"
            )
        self._choose_roots(pl_module)
        self._check_kept(pl_module)
        if self.save is not None and trainer.is_global_zero:
            _identify(pl_module, with_weights=False)
            check_target(self.save)
        if self._artefact is not None:
            self._artefact.check_files()
            run = _identify(pl_module, with_weights=weights_are_final)
            self._artefact.identity.check_serves(run, self._artefact.folder)

    def reset(self) -> None:
        """Give the network back in float, to the bit, so that it can be measured and quantized again.

        Raises:
            ConfigError: If the float weights are gone: after a `fit`, or where a saved model was loaded.
        """
        if self.report is None:
            return
        if self._quantized is None:
            raise ConfigError(
                "this network was quantized by an earlier run that did not keep its float weights (a fit, or a model "
                "that was loaded); make a new task and a new Trainer"
            )
        self._quantized.remove()
        self._quantized = self.report = None

    def fingerprint(self) -> str:
        """Return everything that decides the quantized network beside model and data, as text."""
        artefact = None if self._artefact is None else repr(self._artefact.identity.to_json())
        drawn = (self.calibration_samples, self.calibration_batch_size, self.seed)
        return repr((self.recipe, drawn, artefact))

    # What a sweep asks for

    def check_sweepable(self) -> None:
        """Refuse options that mean nothing for a sweep.

        Raises:
            ConfigError: For a model to load or to save, and a dry run.
        """
        for name in ("load", "save", "dry_run"):
            if self._given[name]:
                raise ConfigError(
                    f"a sweep quantizes every point itself and keeps none of them: leave out --quantize.{name}"
                )

    def at(self, **changes: Any) -> "Quantize":
        """Return a callback with other options, by name."""
        return Quantize(**{**self._given, **changes})

    def recipe_for(self, task: QuantizableTask, /) -> Recipe:
        """Return the recipe without the layers that a task has and does not use.

        Raises:
            ConfigError: Where there is no recipe.
        """
        if self.recipe is None:
            raise ConfigError("expected a recipe, got none; give --quantize.recipe")
        self._choose_roots(task)
        return _for_task(self.recipe, task)

    def calibrate(
        self,
        trainer: pl.Trainer,
        task: QuantizableTask,
        recipes: Sequence[Recipe],
        progress: Callable[[str, int, int], None],
    ) -> list[Quantized]:
        """Calibrate the networks of a task for several recipes at once.

        Args:
            trainer: Of the run; its data module has the calibration pictures.
            task: On its device.
            recipes: Of `recipe_for`.
            progress: Told the name of each layer that is done, how many are, and of how many.

        Returns:
            One quantized form for each recipe; the network stays float.
        """

        def forward(batch: CalibrationBatch) -> Any:
            return task.calibration_forward(move_data_to_device(batch, task.device))

        with torch.inference_mode(False), torch.enable_grad():
            return quantize_many(
                task.roots(),
                self._calibration_batches(trainer),
                recipes,
                forward=forward,
                dry_run=self.dry_run,
                memory_limit_bytes=None if self.memory_limit_gb is None else int(self.memory_limit_gb * 1e9),
                progress=progress,
            )

    def _choose_roots(self, pl_module: QuantizableTask) -> None:
        """Let a task with networks that are quantized on demand know which patterns the run has."""
        if self.recipe is not None:
            pl_module.offer_roots(self.recipe.include)

    def _check_kept(self, pl_module: QuantizableTask) -> None:
        """Refuse to save where a network is quantized that a saved model does not hold; a float head is no matter."""
        roots = pl_module.roots()
        if self.save is None or self.recipe is None or set(roots) == {KEPT}:
            return
        plan = preview(roots, _for_task(self.recipe, pl_module))
        others = sorted({entry.name.partition(".")[0] for entry in plan.quantized} - {KEPT})
        if KEPT not in roots:
            raise ConfigError(
                f"--quantize.save keeps a CLIP, but this task has none (it quantizes {', '.join(roots)}); leave out "
                "--quantize.save"
            )
        if others:
            raise ConfigError(
                f"--quantize.save keeps a CLIP alone, but {', '.join(others)} would be quantized, too; leave "
                f"{'it' if len(others) == 1 else 'them'} out with --quantize.include '{KEPT}.*', or leave out "
                "--quantize.save"
            )

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """In `fit`: quantize here, on the device of this process."""
        if stage == TrainerFn.FITTING and self.active:
            self.preflight(trainer, require(pl_module, QuantizableTask), weights_are_final=True)
            pl_module.to(trainer.strategy.root_device)
            self._apply(trainer, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """In `validate`: quantize before the first batch."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._apply(trainer, pl_module)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """In `test`: quantize before the first batch."""
        self._apply(trainer, pl_module)

    def quantize_now(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Quantize, or load the quantized model, outside of any loop."""
        self._apply(trainer, pl_module)

    def _apply(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.swept or not self.active or self.report is not None or self.recipe is None:
            return
        pl_module = require(module, QuantizableTask)
        if trainer.state.fn != TrainerFn.FITTING:
            pl_module.prepare_weights()  # a head that no checkpoint brought
        self._choose_roots(pl_module)
        if self._artefact is not None:
            if not self.paused:
                self._load(self._artefact, pl_module)
            return
        self._check_kept(pl_module)  # a checkpoint may have brought a head
        recipe = _for_task(self.recipe, pl_module)
        if self.paused:  # the float pass begins: tell now what would fail after it
            self._calibration_batches(trainer)
            preview(pl_module.roots(), recipe)
            return
        identity = _identify(pl_module) if self.save is not None and trainer.is_global_zero else None
        with torch.inference_mode(False), _progress(trainer) as progress:
            (quantized,) = self.calibrate(trainer, pl_module, [recipe], progress)
            quantized.install()
        self.report = quantized.report
        if trainer.state.fn != TrainerFn.FITTING:
            self._quantized = quantized
        log.info("quantized %d layers in %.1f s", len(self.report.map.quantized), self.report.seconds)
        pl_module.variant = _in_words(recipe)
        if self.dry_run:
            raise DryRunComplete(self.report)
        if self.save is not None and identity is not None:
            clip = {KEPT: pl_module.roots()[KEPT]}
            save_quantized(self.save, clip, report=self.report, recipe=recipe, identity=identity)

    def _calibration_batches(self, trainer: pl.Trainer) -> Any:
        data = require(trainer.datamodule, CalibrationData)  # type: ignore[attr-defined]
        return data.calibration_dataloader(
            samples=self.calibration_samples, batch_size=self.calibration_batch_size, seed=self.seed
        )

    def _load(self, artefact: Artefact, pl_module: QuantizableTask) -> None:
        artefact.identity.check_serves(_identify(pl_module), artefact.folder)
        self.report = artefact.load_into({KEPT: pl_module.roots()[KEPT]})
        pl_module.variant = _in_words(artefact.recipe)
        log.info("loaded %d quantized layers from %s", len(self.report.map.quantized), artefact.folder)


class DryRunComplete(Exception):  # noqa: N818 - it ends the run as asked, nothing went wrong
    """Ends a run after the plan is made.

    Attributes:
        report: The plan.
    """

    def __init__(self, report: QuantizationReport) -> None:
        super().__init__("dry run complete")
        self.report = report


@contextmanager
def _progress(trainer: pl.Trainer) -> Iterator[Callable[[str, int, int], None]]:
    """Show the layers of a search as they are done, with the time left; on the first rank, if it has a terminal."""
    described = TextColumn("{task.description}")
    columns = (TextColumn("calibrating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), described)
    with Progress(*columns, transient=True, disable=not trainer.is_global_zero) as bar:
        task = bar.add_task("", total=None)
        yield lambda name, done, total: bar.update(task, description=name, completed=done, total=total)


def _patterns(given: list[str] | str | None) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given or ())


def _for_task(recipe: Recipe, pl_module: QuantizableTask) -> Recipe:
    """Leave out the layers that the task has and does not use; its calibration batches do not reach them."""
    unused = pl_module.unused_layers()
    return replace(recipe, exclude=(*recipe.exclude, *unused)) if unused else recipe


def _in_words(recipe: Recipe) -> str:
    return f"{recipe.name}, {recipe.bits.in_words()}"


def _refuse_beside_load(names: list[str]) -> None:
    if names:
        flags = ", ".join(f"--quantize.{name}" for name in names)
        raise ConfigError(
            f"--quantize.load brings recipe, options and widths, and nothing is calibrated or saved: leave out {flags}"
        )


def _identify(pl_module: QuantizableTask, *, with_weights: bool = True) -> ModelIdentity:
    return identify(pl_module.loaded, with_weights=with_weights)


OF_THE_RUN = {"calibration_samples", "calibration_batch_size", "seed", "memory_limit_gb", "dry_run", "save", "load"}
DECIDED_BY_ARTEFACT = tuple(name for name in signature(Quantize).parameters if name not in OF_THE_RUN)
"""Arguments of `Quantize` that a loaded model answers."""

if TYPE_CHECKING:

    def _fulfils(callback: Quantize) -> tuple[Quantizing[Recipe, QuantizationReport], Calibrating[Recipe]]:
        """Hold the callback against what the Trainer asks of it."""
        return callback, callback
