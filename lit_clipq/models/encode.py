"""Image and text embeddings of any CLIP, the text tower running only as far as the batch's longest text."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


def encode_image(model: nn.Module, images: Tensor) -> Tensor:
    """Embed pictures.

    Args:
        model: An open_clip model.
        images: Preprocessed pictures (B, 3, H, W) in the model's type and on its device.

    Returns:
        Embeddings (B, D), not normalised.
    """
    return model.encode_image(images, normalize=False)  # type: ignore[operator]


def encode_text(model: nn.Module, tokens: Tensor) -> Tensor:
    """Embed texts, trimmed to the longest of the batch where that cannot change the result.

    In a causal text tower that is pooled at the end token no position after that token has a path to the output. So
    only the first `text_lengths(model, tokens).max()` positions are computed. Bidirectional towers, towers pooled
    elsewhere and CoCa's appended class token run at full length through the model's own `encode_text`.

    Args:
        model: An open_clip model.
        tokens: int64 token ids (B, L) with L at most the model's context length.

    Returns:
        Embeddings (B, D), not normalised.
    """
    tower = end_token_tower(model)
    if tower is None:
        return model.encode_text(tokens, normalize=False)  # type: ignore[operator]
    end = tower.end_positions(tokens)
    length = int(end.max()) + 1 if len(end) else 1
    return tower.encode(tokens[:, :length], end)


def text_lengths(model: nn.Module, tokens: Tensor) -> Tensor:
    """Count the positions of each text that can influence its embedding.

    Args:
        model: An open_clip model.
        tokens: int64 token ids (B, L).

    Returns:
        int64 (B,): the length up to and including the end token for a causal tower pooled there, else L.
    """
    tower = end_token_tower(model)
    if tower is None:
        return torch.full((len(tokens),), tokens.shape[1], dtype=torch.int64, device=tokens.device)
    return tower.end_positions(tokens) + 1


def has_end_token_rule(model: nn.Module) -> bool:
    """Tell whether the text tower is causal and pooled at the end token, so that later positions never matter."""
    return end_token_tower(model) is not None


def end_token_root(model: nn.Module) -> nn.Module | None:
    """Return the module with the parts of a causal text tower that is pooled at the end token, else None."""
    tower = end_token_tower(model)
    return None if tower is None else tower.root


@dataclass(frozen=True)
class EndTokenTower:
    """A causal open_clip text tower that is pooled at its end token.

    Attributes:
        root: Module with the parts of the tower: the CLIP itself, or its `text`.
        eos_id: Id of the end token; None where the end token is the largest id of the text.
    """

    root: Any
    eos_id: int | None

    def end_positions(self, tokens: Tensor) -> Tensor:
        """Return the pooled position (B,): the first end token, found as open_clip's `text_global_pool` does."""
        marks = tokens if self.eos_id is None else (tokens == self.eos_id).int()
        return marks.argmax(dim=-1)

    def hidden(self, tokens: Tensor) -> Tensor:
        """Run the blocks on tokens (B, L), the mask and the positions cut to L; (B, L, width) before `ln_final`."""
        root = self.root
        length = tokens.shape[1]
        dtype = root.transformer.get_cast_dtype()
        x = root.token_embedding(tokens).to(dtype) + root.positional_embedding[:length].to(dtype)
        return root.transformer(x, attn_mask=root.attn_mask[:length, :length])  # type: ignore[no-any-return]

    def encode(self, tokens: Tensor, end: Tensor) -> Tensor:
        """Embed tokens (B, L) pooled at the positions `end` (B,)."""
        root = self.root
        x = self.hidden(tokens)
        # the final LayerNorm works on each position alone: only the pooled one is needed
        x = root.ln_final(x[torch.arange(len(x), device=x.device), end])
        if root.text_projection is None:
            return x
        return root.text_projection(x) if isinstance(root.text_projection, nn.Module) else x @ root.text_projection


def end_token_tower(model: Any) -> EndTokenTower | None:
    """Return the text tower where the rule of the end token holds, else None."""
    root, pool, eos = model, getattr(model, "text_pool_type", None), getattr(model, "text_eos_id", None)
    if hasattr(model, "text"):
        root = model.text
        pool, eos = getattr(root, "pool_type", None), getattr(root, "eos_id", None)
    causal = getattr(root, "attn_mask", None) is not None
    appends_class_token = getattr(root, "cls_emb", None) is not None
    if not causal or appends_class_token or getattr(root, "use_pad_mask", False):
        return None
    if pool == "argmax":
        return EndTokenTower(root, None)
    return EndTokenTower(root, eos) if pool == "eos" and eos is not None else None
