"""Pre-training of a causal language model on captions: how the mini language model was made."""

from pathlib import Path

import torch.nn.functional as F
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from lit_clipq.tasks.contrastive import export_weights
from lit_clipq.tasks.schedule import adamw_with_cosine, check_schedule
from lit_clipq.zerocap.language import load_language_model


def next_token_loss(logits: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the mean cross entropy of each token given those before it.

    Args:
        logits: (B, L, V).
        input_ids: int64 (B, L).
        attention_mask: (B, L), 1 on tokens that count and 0 on padding behind them.

    Returns:
        Scalar, nats a token.

    Example:
        >>> import torch
        >>> ids = torch.tensor([[0, 1, 2, 0]])
        >>> loss = next_token_loss(torch.zeros(1, 4, 8), ids, torch.tensor([[1, 1, 1, 0]]))
        >>> round(loss.item(), 4) == round(torch.tensor(8.0).log().item(), 4)
        True
    """
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), input_ids[:, 1:].flatten(), reduction="none")
    counted = attention_mask[:, 1:].flatten().to(losses.dtype)
    return (losses * counted).sum() / counted.sum().clamp(min=1)


class LanguageModelling(LightningModule):
    """Train a causal language model from random weights.

    AdamW with decay on matrices only, linear warm-up, cosine decay to zero. Batches are
    `{"input_ids": int64 (B, L), "attention_mask": (B, L)}`, padded on the right.

    Args:
        name: `mini-gpt2`, or a folder with a transformers configuration and tokenizer.
        random_weights: Whether to start from random weights; else from those in the folder.
        learning_rate: at the end of the warm-up.
        weight_decay: of AdamW, on parameters with two axes or more.
        warmup_steps: optimizer steps of linear warm-up.
        schedule_steps: optimizer steps after which the cosine reaches zero; None for the length of the run.
        export: where the trained weights go as fp16 safetensors after the last step; None for nowhere.

    Raises:
        ConfigError: A rate or a length below its least value.
    """

    def __init__(
        self,
        name: str = "mini-gpt2",
        random_weights: bool = True,
        learning_rate: float = 2e-3,
        weight_decay: float = 0.1,
        warmup_steps: int = 100,
        schedule_steps: int | None = None,
        export: str | None = None,
    ) -> None:
        super().__init__()
        check_schedule(learning_rate, warmup_steps, schedule_steps)
        self.save_hyperparameters()
        loaded = load_language_model(name, random_weights=random_weights)
        self.lm = loaded.model.train()
        self.tokenizer = loaded.tokenizer
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        self.schedule_steps = schedule_steps
        self.export = export

    def roots(self) -> dict[str, nn.Module]:
        """Return the networks of the task by name."""
        return {"lm": self.lm}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:  # noqa: ARG002 - Lightning's signature
        """Return the loss of one batch."""
        loss = self._loss(batch)
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True, batch_size=len(batch["input_ids"]))
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:  # noqa: ARG002 - Lightning's signature
        """Log the loss, nats a token, averaged over batches and processes."""
        self.log("val_loss", self._loss(batch), prog_bar=True, sync_dist=True, batch_size=len(batch["input_ids"]))

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        # Padding is behind the text, where a causal model does not see it.
        return next_token_loss(self.lm(input_ids=ids, use_cache=False).logits, ids, mask)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW and its schedule, stepped after every optimizer step."""
        total = self.schedule_steps or int(self.trainer.estimated_stepping_batches)
        return adamw_with_cosine(self.lm.parameters(), self.learning_rate, self.weight_decay, self.warmup_steps, total)

    def on_train_end(self) -> None:
        """Export the weights if asked to."""
        if self.export is not None and self.trainer.is_global_zero:
            export_weights(self.lm, Path(self.export))
