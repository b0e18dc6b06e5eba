"""Visual question answering: an MCAN head on the token features of a frozen CLIP, trained and evaluated."""

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from lit_clipq.contracts import AnswerData, CalibrationBatch, QuestionData, require
from lit_clipq.errors import ConfigError, ModelError
from lit_clipq.features import CacheOptions, FeatureCache, decode
from lit_clipq.metrics import VQAAccuracy
from lit_clipq.models import (
    MCAN,
    encode_image_tokens,
    encode_text_tokens,
    layers_behind_tokens,
    mcan_options,
    token_sizes,
)
from lit_clipq.models.hashing import network_hash, state_hash
from lit_clipq.tasks.task import ClipTask, datamodule_of
from lit_clipq.tasks.vqa_head import HeadRecord, head_path, load_head, save_head

logger = logging.getLogger(__name__)

RECORD = "vqa"
"""Key of a checkpoint under which the head says what it is."""


def answer_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the binary cross-entropy, summed over answers and averaged over questions.

    MCAN (arXiv:1906.10770) sums over the batch as well, at the same learning rate. Adam does not see the factor (its
    step is the ratio of two moments of the gradient, but for eps = 1e-9), and the mean is what makes N processes, whose
    gradients are averaged, take the step of one.

    Args:
        logits: `(B, V)`.
        targets: Soft targets in [0, 1], `(B, V)`.

    Returns:
        Scalar float32, nats a question.

    Example:
        >>> round(answer_loss(torch.zeros(2, 3), torch.ones(2, 3)).item(), 4)
        2.0794
    """
    return F.binary_cross_entropy_with_logits(logits.float(), targets.float(), reduction="sum") / len(logits)


class VQA(ClipTask):
    """Answer questions with an MCAN head, measured by the official accuracy of VQA v2.

    `fit` computes the features of the frozen CLIP once, keeps them on disk and trains the head on them; CLIP is then
    never called. `validate` runs CLIP. Batches of the data module have `images` (B, 3, H, W) and `texts` int64 (B, L),
    or cached features, beside `targets`, `question_ids`, `image_ids`, `answers` and `answer_types`.

    A checkpoint holds the head, its vocabulary and the state of the training, and refers to CLIP by a hash.

    Args:
        name: Model name or path of an open_clip config JSON.
        pretrained: open_clip tag, local weights file, `mini`, or None for random weights.
        head: `small` and `large` are MCAN's, `mini` is for the mini world.
        head_options: Sizes that differ from those of `head`, by name; see `MCANOptions`.
        head_weights: File of a trained head (see `export`), or `mini` for the one that ships with a mini model, to
            evaluate where no checkpoint is given. `fit` starts from random weights.
        question_only: Show the head no pictures: their features are zero. For comparison.
        learning_rate: Base rate of Adam; MCAN's is 1e-4 for `small` and 5e-5 for `large`.
        betas: Decay of Adam's running means of the gradient and of its square.
        eps: Added to the denominator of Adam's step.
        warmup: Factor on the rate in each of the first epochs.
        decay_epochs: Epochs, counted from 0, before which the rate decays.
        decay: Factor of a decay.
        cache: Where features are kept; null runs CLIP in every step.
        export: Where the trained head goes as fp16 safetensors after the last step; None for nowhere.
        answers: Vocabulary of a head with random weights; by default that of the data module, weights or checkpoint.
        **kwargs: How the CLIP is loaded and pictures are prepared; see `ClipTask`.

    Raises:
        ConfigError: An option outside its range.
        ModelError: A CLIP without token features, or weights of another head.
    """

    def __init__(
        self,
        name: str,
        pretrained: str | None = None,
        head: Literal["small", "large", "mini"] = "small",
        head_options: dict[str, Any] | None = None,
        head_weights: str | None = None,
        question_only: bool = False,
        learning_rate: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-9,
        warmup: Sequence[float] = (0.25, 0.5, 0.75),
        decay_epochs: Sequence[int] = (10, 12),
        decay: float = 0.2,
        cache: CacheOptions | None = CacheOptions(),  # noqa: B008 frozen
        export: str | None = None,
        answers: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(name, pretrained, **kwargs)
        if (
            learning_rate <= 0
            or not 0 < decay <= 1
            or any(factor <= 0 for factor in warmup)
            or min(decay_epochs, default=0) < 0
        ):
            raise ConfigError(
                f"expected learning_rate > 0, factors of warmup > 0, decay_epochs >= 0 and decay in (0, 1], got "
                f"{learning_rate}, {list(warmup)}, {list(decay_epochs)} and {decay}; correct them under --model."
            )
        if any(not 0 <= beta < 1 for beta in betas) or eps < 0:
            raise ConfigError(
                f"expected betas in [0, 1) and eps >= 0, got {list(betas)} and {eps}; correct them under --model."
            )
        self.save_hyperparameters(ignore=["cache", "answers"], logger=False)
        self.options = mcan_options(head, head_options)
        self.question_only = question_only
        self.learning_rate = learning_rate
        self.betas = betas
        self.eps = eps
        self.warmup = tuple(warmup)
        self.decay_epochs = tuple(decay_epochs)
        self.decay = decay
        self.cache = cache
        self.export = export
        self.metric = VQAAccuracy()
        self.head: MCAN | None = None
        self.words: tuple[str, ...] = ()
        self.sizes = token_sizes(self.clip, self.preprocessing.tokenizer(["what"]))
        self.clip_hash = state_hash(self.clip)
        self._random_state: list[dict[str, Tensor]] | None = None
        self.head_weights = head_weights
        if answers is not None:
            self._build_head(answers)

    # Networks

    def roots(self) -> dict[str, nn.Module]:
        """Networks that may be quantized, by name; the head is not while it is trained."""
        if self.head is None or self._fits():
            return {"clip": self.clip}
        return {"clip": self.clip, "head": self.head}

    def unused_layers(self) -> tuple[str, ...]:
        """Patterns of the layers that no token feature depends on: projections into the joint space, poolings."""
        return tuple(f"clip.{pattern}" for pattern in layers_behind_tokens(self.clip))

    def calibration_forward(self, batch: CalibrationBatch) -> dict[str, Tensor]:
        """Run the network on a calibration batch; gradients flow where they are enabled.

        Args:
            batch: images (B, 3, H, W) or None, and tokens int64 (B, L) or None.

        Returns:
            As far as the batch has them, what the head reads, each weighing by itself: `image_tokens` float32 (B, T, D)
            and `text_tokens` (B, L, D), zero and without gradient where a token says nothing, always as long as the
            context, so that a sample does not depend on its batch. With both and a head, `answers` (B, V), from which
            no gradient reaches CLIP.
        """
        images, texts = batch
        outputs = {}
        if images is not None:
            outputs["image_tokens"] = encode_image_tokens(self.clip, images).float()
        if texts is not None:
            features, mask = self._text_features(texts)
            outputs["text_tokens"] = F.pad(features, (0, 0, 0, texts.shape[1] - features.shape[1]))
        if images is not None and texts is not None and "head" in self.roots() and self.head is not None:
            image = outputs["image_tokens"].detach()
            image = torch.zeros_like(image) if self.question_only else image
            outputs["answers"] = self.head(image, features.detach(), None, mask)
        return outputs

    def _text_features(self, texts: Tensor) -> tuple[Tensor, Tensor]:
        features, mask = encode_text_tokens(self.clip, texts)
        return features.float() * mask[..., None], mask

    # Head

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        """Score the answers to a batch of questions.

        Args:
            batch: With `images` and `texts`, or cached features; see `FeatureBatch`.

        Returns:
            Logits (B, V).

        Raises:
            ConfigError: There is no head yet.
        """
        if self.head is None:
            raise ConfigError(
                "there is no trained head to answer with; give --ckpt_path of a training, or --model.head_weights."
            )
        if "image" in batch:
            image, text = (decode(batch[key], batch.get(f"{key}_scales")) for key in ("image", "text"))
            image_mask, text_mask = batch["image_mask"], batch["text_mask"]
        else:
            with torch.no_grad():
                image, image_mask = self._image_features(batch["images"], batch["image_ids"]), None
                text, text_mask = self._text_features(batch["texts"])
        if self.question_only:
            image = torch.zeros_like(image)
        logits: Tensor = self.head(image, text, image_mask, text_mask)
        return logits

    def _image_features(self, images: Tensor, image_ids: Tensor) -> Tensor:
        """Encode each distinct picture of a batch once."""
        ids, place = image_ids.unique(return_inverse=True)
        one_of_each = torch.zeros_like(ids).scatter_(0, place, torch.arange(len(place), device=ids.device))
        return encode_image_tokens(self.clip, images[one_of_each]).float()[place]

    def _build_head(self, words: Sequence[str]) -> None:
        self.words = tuple(words)
        with torch.random.fork_rng([]):  # whatever was drawn since the seed was set: calibration, another head
            torch.manual_seed(torch.initial_seed())
            self.head = MCAN(self.options, self.sizes.image_width, self.sizes.text_width, len(self.words))
        self.head.to(next(self.clip.parameters()).device)

    def prepare_weights(self) -> None:
        """Load the head of `head_weights`, if there is none yet.

        Raises:
            ModelError: The file is absent or damaged, or holds another head.
        """
        if self.head is not None or self.head_weights is None:
            return
        path = head_path(self.head_weights, self.model_name)
        state, record = load_head(path)
        with torch.inference_mode(False):  # the loop of an evaluation has begun where no QuantTrainer runs it
            self._take(record, str(path), "" if _is_planted(self.model_name, self.head_weights) else self.clip_hash)
            if self.head is not None:
                self.head.load_state_dict(state)
                self.head.train(self.training)

    def _take(self, record: HeadRecord, source: str, clip_hash: str) -> None:
        """Check that weights fit, and build a head for their vocabulary.

        Raises:
            ModelError: They belong to another head or CLIP.
        """
        sizes = {"image_width": self.sizes.image_width, "text_width": self.sizes.text_width}
        described = {**vars(self.options), **sizes}
        described.pop("dropout")
        record.check_fits(described, self._clip_words(), clip_hash, self.question_only, source)
        if self.head is None or self.words != record.words:
            self._build_head(record.words)

    def record(self) -> HeadRecord:
        """Say what the head is."""
        if self.head is None:
            raise ConfigError("there is no head yet; train one with `lightning fit`.")
        return HeadRecord(
            head=self.head.description(),
            words=self.words,
            question_only=self.question_only,
            clip=self._clip_words(),
            clip_hash=self.clip_hash,
            variant=self.variant,
            network=network_hash(self.clip) if self._fits() else "",
        )

    def _clip_words(self) -> str:
        return f"{self.model_name} ({self.pretrained or 'random weights'})"

    def _fits(self) -> bool:
        trainer = self._trainer
        return trainer is not None and trainer.state.fn == TrainerFn.FITTING

    # Training

    def setup(self, stage: str) -> None:
        """In `fit`: build the head, freeze CLIP as it is now, and compute the features that are not on disk."""
        super().setup(stage)
        if stage != TrainerFn.FITTING:
            return
        self._check_export()
        warnings.filterwarnings("ignore", message=r".*module\(s\) in eval mode at the start of training.*")
        data = require(datamodule_of(self), QuestionData)
        self._build_head(data.answers.words)
        self.clip.requires_grad_(False).eval()
        # Buffers of CLIP (integer codes!) would otherwise be sent from the first process to all others in every step.
        held = [*self.clip.named_parameters(), *self.clip.named_buffers()]
        self._ddp_params_and_buffers_to_ignore = [f"clip.{name}" for name, _ in held]
        data.use_collators({})
        if self.cache is not None:
            self.clip.to(self.trainer.strategy.root_device)
            features = FeatureCache(
                clip=self.clip,
                preprocessing=self.preprocessing,
                model=self._clip_words(),
                variant=self.variant,
                options=self.cache,
                group=0 if self.cache.shared else self.trainer.node_rank,
            )
            with _progress(self.trainer) as progress:
                data.use_collators(features.batches(data, ("train", "val"), progress))

    def _check_export(self) -> None:
        """Refuse a file that cannot be written before the training, not after it."""
        if self.export is None or not self.trainer.is_global_zero:
            return
        path = Path(self.export)
        try:
            if path.is_dir():
                raise IsADirectoryError("it is a folder")
            path.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path.parent).close()
        except OSError as error:
            raise ConfigError(f"the head cannot be written to {path}: {error}; give another --model.export.") from error

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return Adam on the head and its schedule, stepped after every epoch."""
        parameters = [] if self.head is None else list(self.head.parameters())
        optimizer = torch.optim.Adam(parameters, lr=self.learning_rate, betas=self.betas, eps=self.eps, fused=True)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "epoch"}}

    def rate_factor(self, epoch: int) -> float:
        """Return the factor on the learning rate in an epoch, counted from 0."""
        start = self.warmup[epoch] if epoch < len(self.warmup) else 1.0
        return float(start * self.decay ** sum(epoch >= first for first in self.decay_epochs))

    def on_train_start(self) -> None:
        """Start from the seed, whatever was drawn since it was set, with dropout of its own on each process.

        A training that continues restores its states instead.
        """
        if self._random_state is None:
            torch.manual_seed((torch.initial_seed() + self.global_rank) % 2**63)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:  # noqa: ARG002 Lightning's signature
        """Before the first batch of a training that continues: restore the random state of its last one."""
        states, self._random_state = self._random_state, None
        if states is None:
            return
        if self.global_rank >= len(states):
            logger.warning("the checkpoint holds no random state of process %d", self.global_rank)
            return
        state = states[self.global_rank]
        torch.set_rng_state(state["cpu"].cpu())
        if "device" in state and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["device"].cpu(), self.device)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:  # noqa: ARG002 Lightning's signature
        """Return the loss of one batch."""
        loss = answer_loss(self(batch), batch["targets"])
        self.log(
            "train_loss",
            loss.detach(),
            on_step=True,
            on_epoch=True,
            prog_bar=True,
            sync_dist=True,
            batch_size=len(batch["targets"]),
        )
        return loss

    def on_train_end(self) -> None:
        """Export the head if asked to."""
        if self.export is not None and self.head is not None and self.trainer.is_global_zero:
            save_head(Path(self.export), self.head.state_dict(), self.record())
            logger.info("head written to %s", self.export)

    # Evaluation

    def prepare_evaluation(self) -> None:
        """Take the head of `head_weights` if no checkpoint brought one; the data module reports by its answers."""
        if not self._fits():
            self.prepare_weights()
        data = datamodule_of(self)
        if not self._fits() and self.head is not None and isinstance(data, AnswerData):
            data.use_answers(self.words)

    def evaluation_step(self, batch: Mapping[str, Any]) -> None:
        """Answer one batch of questions."""
        best = self(batch).argmax(dim=1).tolist()
        self.metric.update(
            [self.words[index] for index in best],
            batch["answers"],
            batch["answer_types"],
            ids=batch["question_ids"],
            image_ids=batch["image_ids"],
        )

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave CLIP out; add what the head is, its vocabulary and the random state of every process."""
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: value for name, value in state.items() if not name.startswith("clip.")}
        checkpoint[RECORD] = {**self.record().to_plain(), "random": self._gather_random_state()}
        if "hyper_parameters" in checkpoint:
            checkpoint["hyper_parameters"]["answers"] = list(self.words)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the head and its vocabulary; CLIP stays the run's own.

        Raises:
            ModelError: The checkpoint belongs to another task, head, CLIP or, to train on, vocabulary or quantization.
        """
        plain = dict(checkpoint.get(RECORD) or {})
        random = plain.pop("random", None)
        record = HeadRecord.from_plain(plain, "the checkpoint")
        if self._fits():
            self._check_continues(record)
            self._random_state = random
        elif record.variant != self.variant:
            logger.info("the head was trained on CLIP as '%s' and is evaluated on others, too", record.variant)
        self._take(record, "the checkpoint", self.clip_hash)
        own = {f"clip.{name}": value for name, value in self.clip.state_dict().items()}
        checkpoint["state_dict"] = {**checkpoint["state_dict"], **own}

    def _check_continues(self, record: HeadRecord) -> None:
        if record.words != self.words:
            raise ModelError(
                f"the checkpoint answers with {len(record.words)} words, the data module has another vocabulary of "
                f"{len(self.words)}; train with the data and --data.vocabulary it was taken with."
            )
        if record.clip_hash == self.clip_hash and record.network != network_hash(self.clip):
            raise ModelError(
                f"the checkpoint was trained on features of {record.clip} as '{record.variant}', but this run has it "
                f"as '{self.variant}'"
                + ("" if record.variant != self.variant else " with other codes or scales")
                + "; quantize as before, or keep the quantized model with --quantize.save and give --quantize.load."
            )

    def _gather_random_state(self) -> list[dict[str, Tensor]]:
        own = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            own["device"] = torch.cuda.get_rng_state(self.device)
        if not (dist.is_available() and dist.is_initialized()):
            return [own]
        states: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(states, own)
        return states


@contextmanager
def _progress(trainer: Trainer) -> Iterator[Callable[[str, float], None]]:
    """Show what is being computed and the time left; on the first process, where the Trainer has a progress bar."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    shown = trainer.is_global_zero and trainer.progress_bar_callback is not None
    with Progress(*columns, transient=True, disable=not shown) as bar:
        tasks: dict[str, TaskID] = {}

        def update(words: str, share: float) -> None:
            if words not in tasks:
                tasks[words] = bar.add_task(words, total=1.0)
            bar.update(tasks[words], completed=share)

        yield update


def _is_planted(name: str, head_weights: str) -> bool:
    """Tell whether the shipped head is asked for on a model with planted outliers, the same function to the bit."""
    return head_weights == "mini" and name.endswith("-outlier")
