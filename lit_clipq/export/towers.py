"""The two towers of a CLIP as modules of one input and one output."""

from typing import Any

import torch
from torch import Tensor, nn

from lit_clipq.models import LoadedCLIP
from lit_clipq.models.encode import end_token_tower


class ImageTower(nn.Module):
    """Preprocessed pictures (B, 3, H, W) to embeddings (B, D), not normalised.

    Args:
        model: A CLIP.
    """

    port, output = "images", "image_embeddings"

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        visual: Any = model.visual
        size = visual.image_size
        self.size: tuple[int, int] = (size, size) if isinstance(size, int) else tuple(size)

    @property
    def free(self) -> dict[int, tuple[str, int | None]]:
        """Axes of any size: name, and the largest size that is traced."""
        return {0: ("batch", None)}

    def example(self) -> Tensor:
        """Return pictures to trace with."""
        return torch.zeros(3, 3, *self.size)

    def forward(self, images: Tensor) -> Tensor:
        """Embed pictures."""
        return self.model.encode_image(images, normalize=False)  # type: ignore[operator, no-any-return]


class TextTower(nn.Module):
    """Token ids (B, L) to embeddings (B, D), not normalised.

    Where no position behind the end token matters L is free up to the context length; else it is the context length.

    Args:
        model: A CLIP.
        context_length: Tokens of a text.
    """

    port, output = "tokens", "text_embeddings"

    def __init__(self, model: nn.Module, context_length: int) -> None:
        super().__init__()
        self.model: Any = model
        self.context_length = context_length
        self.tower = end_token_tower(model)

    @property
    def free(self) -> dict[int, tuple[str, int | None]]:
        """Axes of any size; the full length is traced as a shorter one, or it would count as a case of its own."""
        batch: dict[int, tuple[str, int | None]] = {0: ("batch", None)}
        return batch if self.tower is None else {**batch, 1: ("length", self.context_length - 1)}

    def example(self) -> Tensor:
        """Return token ids to trace with."""
        return torch.ones(3, self.context_length - (self.tower is not None), dtype=torch.int64)

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed texts."""
        if self.tower is None:
            return self.model.encode_text(tokens, normalize=False)  # type: ignore[no-any-return]
        root, x = self.tower.root, self.tower.hidden(tokens)
        rows = torch.arange(tokens.shape[0], device=tokens.device)  # `len` would fix the batch's size
        pooled = root.ln_final(x[rows, self.tower.end_positions(tokens)])
        if root.text_projection is None:
            return pooled  # type: ignore[no-any-return]
        projects = isinstance(root.text_projection, nn.Module)
        return root.text_projection(pooled) if projects else pooled @ root.text_projection  # type: ignore[no-any-return]


def towers_of(loaded: LoadedCLIP) -> dict[str, ImageTower | TextTower]:
    """Return both towers of a CLIP by name, `image` and `text`, in eval mode."""
    text = TextTower(loaded.model, loaded.preprocessing.context_length)
    return {"image": ImageTower(loaded.model).eval(), "text": text.eval()}
