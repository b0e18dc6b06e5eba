"""The analysis of a task on a Trainer: its calibration data, its checkpoint, its metric, its file."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import move_data_to_device
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lit_clipq.analysis.comparison import write_json
from lit_clipq.contracts import CalibrationBatch, CalibrationData, IdentifiedData, MeasuredTask, require
from lit_clipq.errors import ConfigError
from lit_clipq.recipes import Recipe
from lit_clipq.sensitivity import Analysis, analyze
from lit_clipq.trainer.attached import quantizing_of
from lit_clipq.trainer.checks import check_writable
from lit_clipq.trainer.origin import command_line, versions

if TYPE_CHECKING:
    from lit_clipq.trainer.trainer import QuantTrainer


def analyze_task(
    trainer: "QuantTrainer",
    model: LightningModule | None,
    datamodule: LightningDataModule | None,
    ckpt_path: str | Path | None,
    *,
    metric: int,
    **options: Any,
) -> Analysis:
    """Analyse the networks of a task and write `analysis.json`; arguments as for `QuantTrainer.analyze`.

    Args:
        trainer: Has the callback, and the name of the file.
        model: See there.
        datamodule: See there.
        ckpt_path: See there.
        metric: See there.
        **options: See there.
    """
    task, callback = require(model, MeasuredTask), quantizing_of(trainer)
    recipe = callback.recipe if callback is not None and callback.active else None
    if metric < 0:
        raise ConfigError(f"metric must be at least 0, got {metric}")
    if callback is None or recipe is None:
        raise ConfigError("the analysis needs a method and less than 32 bits; give --quantize.recipe")
    if trainer.is_global_zero:
        check_writable(Path(trainer.results))
    analysis = _run(trainer, task, datamodule, callback, ckpt_path, metric=metric, **options)
    origin = {"task": type(task).__name__, "model": task.model_name, "pretrained": task.pretrained}
    content = {**origin, **analysis.to_json(), "quantize": recipe.to_json()}
    write_json(Path(trainer.results), {**content, "versions": versions(), "command": command_line()})
    return analysis


def _run(
    trainer: Trainer,
    task: MeasuredTask,
    datamodule: LightningDataModule | None,
    callback: Any,
    ckpt_path: str | Path | None,
    *,
    measure: int,
    left_float: int,
    blocks: bool,
    metric: int,
    share: float,
) -> Analysis:
    """Analyse the networks of a task; arguments as for `QuantTrainer.analyze`.

    Args:
        trainer: Evaluates the task where its metric is asked for.
        task: With networks in float.
        datamodule: Gives the calibration batches.
        callback: `callbacks.Quantize`, whose recipe and calibration options count.
        ckpt_path: Checkpoint of the task.
        measure: See there.
        left_float: See there.
        blocks: See there.
        metric: See there.
        share: See there.
    """
    if trainer.world_size > 1:
        raise ConfigError("the analysis runs in one process; leave out --trainer.devices")
    data, module = require(datamodule, CalibrationData), require(task, torch.nn.Module)
    if ckpt_path is not None:
        state = torch.load(ckpt_path, map_location="cpu", weights_only=True)
        module.load_state_dict(state["state_dict"])
    task.prepare_weights()
    if isinstance(data, IdentifiedData):
        data.preprocessing = task.preprocessing
        data.prepare_data()
        data.setup("validate")
    recipe_as_given: Recipe = callback.recipe
    task.offer_roots(recipe_as_given.include)
    recipe = replace(recipe_as_given, exclude=(*recipe_as_given.exclude, *task.unused_layers()))
    batches = data.calibration_dataloader(
        samples=callback.calibration_samples, batch_size=callback.calibration_batch_size, seed=callback.seed
    )
    module.to(trainer.strategy.root_device)
    module.eval()

    def forward(batch: CalibrationBatch) -> Any:
        return task.calibration_forward(move_data_to_device(batch, task.device))

    columns = (TextColumn("{task.fields[kind]}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.description}"), transient=True) as bar:
        calibrating = bar.add_task("", total=None, kind="calibrating")
        measuring = bar.add_task("", total=None, kind="measuring")
        analysis, placed = analyze(
            task.roots(), batches, recipe, forward=forward, measure=measure, left_float=left_float, blocks=blocks,
            share=share,
            memory_limit_bytes=None if callback.memory_limit_gb is None else int(callback.memory_limit_gb * 1e9),
            progress=lambda name, done, total: bar.update(calibrating, description=name, completed=done, total=total),
            measured=lambda name, done, total: bar.update(measuring, description=name, completed=done, total=total),
        )  # fmt: skip
    found = {}
    callback.recipe = None  # the network is not to be quantized once more
    try:
        for row in analysis.worst(metric) if metric else ():
            with placed.alone([row.layer]):
                Trainer.validate(trainer, module, datamodule=datamodule, verbose=False)  # type: ignore[arg-type]
                found[row.layer] = task.results()
    finally:
        callback.recipe = recipe_as_given
    rows = tuple(replace(r, metrics=found.get(r.layer, {})) if r.scope == "layer" else r for r in analysis.rows)
    return replace(analysis, rows=rows)
