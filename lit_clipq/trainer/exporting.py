"""The export of a task's CLIP on a Trainer."""

from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningDataModule, LightningModule

from lit_clipq.contracts import IdentifiedData, MeasuredTask, require
from lit_clipq.errors import ConfigError
from lit_clipq.export import ExportOptions, Samples, check_target, embeddings
from lit_clipq.trainer.attached import quantizing_of

if TYPE_CHECKING:
    from lit_clipq.export import ExportReport
    from lit_clipq.trainer.trainer import QuantTrainer


def export_task(
    trainer: "QuantTrainer", model: LightningModule, datamodule: LightningDataModule | None, export: ExportOptions
) -> "ExportReport":
    """Quantize the task's CLIP, or load it quantized, and export it; arguments as for `QuantTrainer.export_model`.

    Args:
        trainer: Calibrates, by its callback.
        model: See there.
        datamodule: See there.
        export: See there.
    """
    from lit_clipq.export import export_clip  # names what is not installed

    callback, task = quantizing_of(trainer), require(model, MeasuredTask)
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
    trainer._data_connector.attach_data(model, datamodule=datamodule)
    callback.reset()
    callback.preflight(trainer, task, weights_are_final=True)
    loaded: Any = task.loaded
    samples = Samples.make(loaded.preprocessing)
    reference = embeddings(loaded, samples)
    model.to(trainer.strategy.root_device)
    callback.quantize_now(trainer, model)
    model.cpu()
    about = {"recipe": None if callback.recipe is None else callback.recipe.to_json(), "reference": "float weights"}
    return export_clip(loaded, export, about=about, reference=reference, samples=samples)
