"""Supervised classification of pictures: one network, no texts."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_clipq.contracts import CalibrationBatch, ClassData, require
from lit_clipq.errors import CalibrationError, ConfigError, DataError
from lit_clipq.metrics import TopKAccuracy
from lit_clipq.models import load_classifier
from lit_clipq.tasks.task import EvaluationTask, datamodule_of


class ImageClassification(EvaluationTask):
    """Top-k accuracy of a timm classifier (ViT, DeiT, Swin, ConvNeXt, ...).

    This is the setting in which PTQ4ViT (arXiv 2111.12293), RepQ-ViT (2212.08254), ERQ (2407.06794) and AdaLog
    (2407.12951) publish. The network is called `vision` in layer names, and its widths are those of an image tower
    (`bits`, `vision_bits` and so on). Batches are as for `ZeroShotClassification`; class i of the data is output i of
    the network.

    Args:
        name: timm name, with or without the tag of its weights.
        pretrained: `timm` for the weights that are published under that name, a local file, or None for random weights.
        num_classes: outputs of the network; by default as many as it was published with.
        ks: how many classes to look at; `top{k}` for each.

    Raises:
        ConfigError: A k below 1, or no k.
    """

    templates: tuple[str, ...] = ()
    """No prompts: calibration batches have no texts."""

    def __init__(
        self,
        name: str,
        pretrained: str | None = None,
        num_classes: int | None = None,
        ks: Sequence[int] = (1, 5),
    ) -> None:
        if not ks or min(ks) < 1:
            raise ConfigError(f"expected `ks` of at least 1, got {list(ks)}.")
        super().__init__(load_classifier(name, pretrained, num_classes))
        self.save_hyperparameters(logger=False)
        self.model: Any = self.loaded.model
        self.metric = TopKAccuracy(ks=ks)

    def roots(self) -> dict[str, nn.Module]:
        """Networks that may be quantized, by name."""
        return {"vision": self.model}

    def calibration_forward(self, batch: CalibrationBatch) -> dict[str, Tensor]:
        """Run the network on the pictures of a calibration batch; gradients flow where they are enabled.

        Args:
            batch: images (B, 3, H, W), and texts, which are not looked at.

        Returns:
            `logits`, float32 (B, classes).

        Raises:
            CalibrationError: A batch without pictures.
        """
        images, _ = batch
        if images is None:
            raise CalibrationError("a classifier calibrates on pictures, got a batch without; give pictures")
        return {"logits": self.logits(images)}

    def prepare_evaluation(self) -> None:
        """Check that data and network mean the same classes.

        Raises:
            DataError: Another number of classes.
        """
        data = require(datamodule_of(self), ClassData)
        if self.model.num_classes != len(data.class_names):
            raise DataError(
                f"classifier {self.model_name} tells {self.model.num_classes:,} classes apart, but the data names "
                f"{len(data.class_names):,}; choose another --model.name or --data.root, or set --model.num_classes"
            )

    def evaluation_step(self, batch: Mapping[str, Tensor]) -> None:
        """Classify one batch."""
        self.metric.update(self.logits(batch["images"]), batch["labels"], batch["image_ids"])

    def logits(self, images: Tensor) -> Tensor:
        """Logits float32 (B, classes) of images (B, 3, H, W)."""
        logits: Tensor = self.model(images)
        return logits.to(torch.float32)
