"""What evaluation tasks share: networks, one loop for validate and test, results and scores per sample."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from torch import Tensor, nn

from lit_clipq.contracts import CalibrationBatch, EncodingTask, MeasuredTask
from lit_clipq.metrics import Evaluation, SampleKeyedMetric, SampleScores
from lit_clipq.models import LoadedCLIP, PreprocessingOptions, encode_image, encode_text, load_clip


class EvaluationTask(LightningModule):
    """Networks and a metric, evaluated by the same code in `validate` and `test`.

    The task does not know whether its networks are quantized: it offers them (`roots`) and the outputs that matter for
    them (`calibration_forward`), and measures whatever they are when the epoch starts. Each evaluation starts from
    nothing, so that several may follow each other on the same objects.

    Args:
        loaded: The model, what prepares its input, and its names.
    """

    metric: SampleKeyedMetric

    def __init__(self, loaded: LoadedCLIP) -> None:
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True  # a shard may be empty
        self.loaded = loaded
        self.preprocessing = loaded.preprocessing
        self.model_name = loaded.name
        self.pretrained = loaded.pretrained
        self.variant = "float"  # what was done to the networks, in words; set by whoever does it
        self._evaluation: Evaluation | None = None
        self._results: dict[str, float] = {}

    @abstractmethod
    def roots(self) -> dict[str, nn.Module]:
        """Networks that may be quantized, by name."""

    @abstractmethod
    def calibration_forward(self, batch: CalibrationBatch) -> dict[str, Tensor]:
        """Run the networks on a calibration batch; outputs that matter by name, with gradients where enabled."""

    def offer_roots(self, include: Sequence[str]) -> None:
        """Learn which patterns of layer names a run has; for networks that `roots` offers on demand only."""

    def prepare_weights(self) -> None:
        """Load what an evaluation needs and the constructor has not loaded, before a first look at the weights."""

    def unused_layers(self) -> tuple[str, ...]:
        """Shell patterns of the layers in `roots` that no output of `calibration_forward` depends on."""
        return ()

    def results(self) -> dict[str, float]:
        """Metrics of the last evaluation, as fractions, by name; the same on every rank."""
        self._last_evaluation()
        return dict(self._results)

    def sample_scores(self) -> dict[str, SampleScores]:
        """Scores of every sample in the last evaluation, by metric name; the same on every rank."""
        return dict(self._last_evaluation().scores)

    def sample_counts(self) -> dict[str, int]:
        """Number of samples by kind in the last evaluation, over all ranks."""
        return dict(self._last_evaluation().counts)

    @abstractmethod
    def evaluation_step(self, batch: Mapping[str, Tensor]) -> None:
        """Evaluate one batch and update `self.metric`."""

    def prepare_evaluation(self) -> None:
        """Compute what all batches need, with the network as it is now."""

    def setup(self, stage: str) -> None:  # noqa: ARG002 Lightning's signature
        """Let every rank take part in the evaluation."""
        in_training = self.trainer.fit_loop.epoch_loop.val_loop
        for loop in (self.trainer.validate_loop, self.trainer.test_loop, in_training):
            if type(loop) is _EvaluationLoop:
                loop.__class__ = _AllRanksEvaluationLoop

    def on_validation_epoch_start(self) -> None:
        """Forget the last evaluation."""
        self.begin_evaluation()
        self.prepare_evaluation()

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:  # noqa: ARG002 Lightning's signature
        """Evaluate one batch."""
        self.evaluation_step(batch)

    def begin_evaluation(self) -> None:
        """Forget the last evaluation."""
        self.metric.reset()
        self._evaluation = None

    def finish_evaluation(self) -> None:
        """Gather and score what is in the metric."""
        self._results = self.metric.compute()
        self._evaluation = self.metric.evaluation()
        self.metric.reset()  # embeddings are large, and no longer needed

    def on_validation_epoch_end(self) -> None:
        """Gather, score and log."""
        self.finish_evaluation()
        # The value is the same on every rank; syncing it only tells Lightning that this is meant.
        self.log_dict(self._results, sync_dist=True)

    def on_test_epoch_start(self) -> None:
        """As for validation."""
        self.on_validation_epoch_start()

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:  # noqa: ARG002 Lightning's signature
        """As for validation."""
        self.evaluation_step(batch)

    def on_test_epoch_end(self) -> None:
        """As for validation."""
        self.on_validation_epoch_end()

    def _last_evaluation(self) -> Evaluation:
        if self._evaluation is None:
            raise RuntimeError("expected a finished evaluation, got none; run `Trainer.validate` or `test` first.")
        return self._evaluation


class ClipTask(EvaluationTask):
    """A CLIP and a metric.

    Args:
        name: model name or path of an open_clip config JSON, as for `lit_clipq.models.load_clip`.
        pretrained: open_clip tag, local weights file or folder, `mini`, or None for random weights.
        quick_gelu: whether the towers use QuickGELU; null leaves it to the configuration and to what the weights say.
        mean: subtracted from red, green and blue in [0, 1], one number or three; null as published with the weights.
        std: what these are divided by, one number or three; null as published.
        interpolation: of resizing; null as published.
        resize_mode: `shortest` side fits and the middle is cut out, `longest` side fits and the rest is filled, or
            `squash` both; null as published.

    Raises:
        ConfigError: A mean or a standard deviation that no picture can be prepared with.
    """

    def __init__(
        self,
        name: str,
        pretrained: str | None = None,
        quick_gelu: bool | None = None,
        mean: list[float] | float | None = None,
        std: list[float] | float | None = None,
        interpolation: Literal["bicubic", "bilinear"] | None = None,
        resize_mode: Literal["shortest", "longest", "squash"] | None = None,
    ) -> None:
        options = PreprocessingOptions(mean, std, interpolation, resize_mode)
        super().__init__(load_clip(name, pretrained, quick_gelu=quick_gelu, preprocessing=options))
        self.clip = self.loaded.model

    def roots(self) -> dict[str, nn.Module]:
        """Networks that may be quantized, by name."""
        return {"clip": self.clip}

    def calibration_forward(self, batch: CalibrationBatch) -> dict[str, Tensor]:
        """Run the network on a calibration batch; gradients flow where they are enabled.

        Args:
            batch: images (B, 3, H, W) or None, and tokens int64 (B, L) or None.

        Returns:
            `image` and `text`, float32 (B, D) of length 1, as far as the batch has them.
        """
        images, texts = batch
        outputs = {}
        if images is not None:
            outputs["image"] = self.embed_images(images)
        if texts is not None:
            outputs["text"] = self.embed_texts(texts)
        return outputs

    def embed_images(self, images: Tensor) -> Tensor:
        """Embeddings of images (B, 3, H, W), float32 (B, D) of length 1."""
        return F.normalize(encode_image(self.clip, images).float(), dim=-1)

    def embed_texts(self, tokens: Tensor) -> Tensor:
        """Embeddings of tokens int64 (B, L), float32 (B, D) of length 1."""
        return F.normalize(encode_text(self.clip, tokens).float(), dim=-1)


class EncodingClipTask(ClipTask):
    """A task that asks its CLIP for embeddings and nothing else; arguments as for `ClipTask`."""

    @contextmanager
    def encoded_by(self, encoder: nn.Module) -> Iterator[None]:
        """Let an encoder with `encode_image` and `encode_text` take the place of the CLIP while the context is open."""
        clip = self.clip
        self.clip = encoder
        try:
            yield
        finally:
            self.clip = clip


if TYPE_CHECKING:

    def _encodes(task: EncodingClipTask) -> EncodingTask:
        """Let the type checker hold the class against its contract."""
        return task

    def _fulfils(task: EvaluationTask) -> MeasuredTask:
        """Let the type checker hold the class against its contract."""
        return task


def datamodule_of(task: LightningModule) -> object:
    """Return the data module that a task runs on, or None where there are bare loaders."""
    return task.trainer.datamodule  # type: ignore[attr-defined]


class _AllRanksEvaluationLoop(_EvaluationLoop):
    """Lightning's loop, on every rank or on none.

    Lightning's own skips the whole loop, hooks included, on a rank whose loaders are all empty. The other ranks would
    then wait for it forever when they gather the metric.
    """

    @property
    def skip(self) -> bool:
        """Whether no rank has a batch. A collective call: `run` reads it once on every rank."""
        batches = torch.tensor(float(sum(self.max_batches)), device=self.trainer.strategy.root_device)
        return bool(self.trainer.strategy.reduce(batches, reduce_op="sum") == 0)
