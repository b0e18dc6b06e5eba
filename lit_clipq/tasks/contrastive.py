"""Contrastive pre-training of a CLIP: how the mini models were made."""

import logging
import math
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from safetensors.torch import save_file
from torch import Tensor, nn

from lit_clipq.errors import ModelError
from lit_clipq.models import encode_image, encode_text, load_clip
from lit_clipq.tasks.schedule import adamw_with_cosine, check_schedule

logger = logging.getLogger(__name__)

MAX_LOGIT_SCALE = 100.0


def info_nce(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """Return the symmetric InfoNCE loss of matching rows.

    (CE(s I T^t, 1..B) + CE(s T I^t, 1..B)) / 2 with cross entropy CE over rows (CLIP, arXiv 2103.00020).

    Args:
        image: normalised embeddings `(B, D)`.
        text: normalised embeddings `(B, D)`, row i belongs to row i of `image`.
        logit_scale: scalar s.

    Returns:
        Scalar, nats.

    Example:
        >>> rows = torch.eye(4)
        >>> round(info_nce(rows, rows, torch.tensor(0.0)).item(), 4) == round(math.log(4), 4)
        True
    """
    logits = logit_scale * image @ text.T  # (B, B)
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def recall_at_1(queries: Tensor, gallery: Tensor) -> float:
    """Return the share of queries whose own row of the gallery is the nearest.

    Args:
        queries: normalised `(N, D)`.
        gallery: normalised `(N, D)`.
    """
    nearest = (queries @ gallery.T).argmax(dim=1)
    return (nearest == torch.arange(len(queries), device=queries.device)).double().mean().item()


class ContrastiveTask(LightningModule):
    """Train an open_clip model from random weights on pairs of pictures and texts.

    AdamW with decay on matrices only, linear warm-up, cosine decay to zero, a learned logit scale of at most 100.
    Batches are `(images (B, 3, H, W) float, tokens (B, L) int64)`; validation batches likewise, of one caption each.

    Args:
        name: model name or path of an open_clip config JSON, as for `lit_clipq.models.load_clip`.
        pretrained: weights to start from; None for random ones.
        learning_rate: at the end of the warm-up.
        weight_decay: of AdamW, on parameters with two axes or more.
        warmup_steps: optimizer steps of linear warm-up.
        schedule_steps: optimizer steps after which the cosine reaches zero; None for the length of the run. A run may
            end before.
        export: where the trained weights go as fp16 safetensors after the last step; None for nowhere.
    """

    def __init__(
        self,
        name: str,
        pretrained: str | None = None,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.1,
        warmup_steps: int = 200,
        schedule_steps: int | None = None,
        export: str | None = None,
    ) -> None:
        super().__init__()
        check_schedule(learning_rate, warmup_steps, schedule_steps)
        self.save_hyperparameters()
        loaded = load_clip(name, pretrained)
        self.clip = loaded.model.train().requires_grad_(True)
        self.preprocessing = loaded.preprocessing
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        self.schedule_steps = schedule_steps
        self.export = export
        self._embedded: list[tuple[Tensor, Tensor]] = []

    def roots(self) -> dict[str, nn.Module]:
        """Return the networks of the task by name."""
        return {"clip": self.clip}

    def embed(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return normalised embeddings `(B, D)` of pictures and texts."""
        images, tokens = batch
        image, text = encode_image(self.clip, images), encode_text(self.clip, tokens)
        return F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:  # noqa: ARG002
        """Return the loss of one batch; each process contrasts the pairs of all processes."""
        image, text = self.embed(batch)
        if self.trainer.world_size > 1:
            image, text = self._gather(image), self._gather(text)
        scale: Tensor = self.clip.logit_scale.exp()  # type: ignore[operator, assignment]
        loss = info_nce(image, text, scale)
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True, batch_size=len(image))
        self.log("logit_scale", scale.detach())
        return loss

    def _gather(self, rows: Tensor) -> Tensor:
        """Return the rows of all processes, `(B, D)` of each stacked in order of rank; gradients flow back."""
        gathered: Any = self.all_gather(rows, sync_grads=True)
        return gathered.flatten(0, 1)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        """Keep the logit scale at 100 or less."""
        with torch.no_grad():
            self.clip.logit_scale.clamp_(max=math.log(MAX_LOGIT_SCALE))  # type: ignore[operator, union-attr]

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:  # noqa: ARG002
        """Embed one batch."""
        self._embedded.append(self.embed(batch))

    def on_validation_epoch_end(self) -> None:
        """Log the recall among the validation pairs of this process, averaged over processes."""
        image, text = (torch.cat(column) for column in zip(*self._embedded, strict=True))
        self._embedded.clear()
        self.log("val_recall@1_i2t", recall_at_1(image, text), prog_bar=True, sync_dist=True)
        self.log("val_recall@1_t2i", recall_at_1(text, image), prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW and its schedule, stepped after every optimizer step."""
        total = self.schedule_steps or int(self.trainer.estimated_stepping_batches)
        return adamw_with_cosine(
            self.clip.parameters(), self.learning_rate, self.weight_decay, self.warmup_steps, total
        )

    def on_train_end(self) -> None:
        """Export the weights if asked to."""
        if self.export is not None and self.trainer.is_global_zero:
            export_weights(self.clip, Path(self.export))


def export_weights(model: nn.Module, path: Path) -> None:
    """Write a model's state as fp16 safetensors, whole or not at all; integer buffers keep their type.

    Raises:
        ModelError: a value is not finite or too large for fp16.
    """
    state: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in places:  # a tied weight, written under its first name
            continue
        places.add(id(tensor))
        value = tensor.detach().cpu()
        state[name] = (value.half() if value.is_floating_point() else value).contiguous()
        if not name.endswith("attn_mask") and not bool(torch.isfinite(state[name]).all()):
            raise ModelError(f"expected finite fp16 weights, got others in {name}; train with a lower learning rate.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(state, temporary, metadata={"format": "pt"})
    temporary.replace(path)
    logger.info("weights written to %s", path)
